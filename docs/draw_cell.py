"""Draws the cell of `equations.md`: `images/cell.svg`.

    python docs/draw_cell.py

It takes on the reader's light or dark colours.
"""

from pathlib import Path

PATH = Path(__file__).parent / "images" / "cell.svg"

# Heights of the memory above and the hidden state below; the gates lie between.
MEMORY, MEET, GATE, HIDDEN = 80, 160, 225, 310
FORGET, INPUT, CANDIDATE, OUTPUT = 200, 300, 400, 500
ADD = (INPUT + CANDIDATE) // 2
OUT = 570

STYLE = """
  svg { --ink: #1b1f24; --faint: #57606a; --card: #f3f4f6; --back: #ffffff; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e6e9ed; --faint: #a3acb8; --card: #2b303b; --back: #1e2129; }
  }
  .card { fill: var(--card); }
  .wire { fill: none; stroke: var(--ink); stroke-width: 2; }
  .memory { stroke-width: 4; }
  .tip { fill: var(--ink); }
  .joint { fill: var(--back); stroke: var(--ink); stroke-width: 2; }
  text { fill: var(--ink); text-anchor: middle; dominant-baseline: central;
    font: 22px "Times New Roman", "Liberation Serif", serif; }
  .letter { font-style: italic; }
  .word { font: 14px system-ui, "DejaVu Sans", sans-serif; fill: var(--faint); }
  .gate text { fill: #ffffff; }
  .gate .word { font-size: 11px; }
  .sub { font-size: 14px; }
"""
# The colours of the gates in the pictures of a trace, dark enough for white letters.
COLOURS = {"f": "#0072B2", "i": "#9C6B00", "c̃": "#B84E00", "o": "#007A59"}


def main(path=PATH):
    parts = [
        '<rect class="card" x="110" y="35" width="520" height="305" rx="18"/>',
        # The memory: kept by f, added to by i * c̃.
        wire((30, MEMORY), (720, MEMORY), css="memory"),
        # What all four gates see.
        wire((30, HIDDEN), (OUTPUT, HIDDEN), (OUTPUT, GATE), tip=False),
        wire((150, 385), (150, HIDDEN), tip=False),
        *(wire((x, HIDDEN), (x, GATE), tip=False) for x in (FORGET, INPUT, CANDIDATE)),
        wire((FORGET, GATE), (FORGET, MEMORY + 15)),
        wire((INPUT, GATE), (INPUT, MEET), (ADD - 15, MEET)),
        wire((CANDIDATE, GATE), (CANDIDATE, MEET), (ADD + 15, MEET)),
        wire((ADD, MEET), (ADD, MEMORY + 15)),
        # The hidden state: what o lets out of the memory.
        wire((OUT, MEMORY), (OUT, MEET - 15)),
        wire((OUTPUT, GATE), (OUTPUT, MEET), (OUT - 15, MEET)),
        wire((OUT, MEET), (OUT, HIDDEN), (720, HIDDEN)),
        joint(FORGET, MEMORY, "×"),
        joint(ADD, MEET, "×"),
        joint(ADD, MEMORY, "+"),
        joint(OUT, MEET, "×"),
        f'<rect class="joint" x="{OUT - 27}" y="{118 - 14}" width="54" height="28" '
        'rx="14"/>',
        f'<text class="word" x="{OUT}" y="118">tanh</text>',
        gate(FORGET, "f", "sigmoid"),
        gate(INPUT, "i", "sigmoid"),
        gate(CANDIDATE, "c̃", "tanh"),
        gate(OUTPUT, "o", "sigmoid"),
        letter(60, MEMORY - 25, "c", "t−1"),
        letter(685, MEMORY - 25, "c", "t"),
        letter(60, HIDDEN - 25, "h", "t−1"),
        letter(685, HIDDEN - 25, "h", "t"),
        letter(172, 372, "x", "t"),
        word(685, MEMORY + 25, "memory"),
        word(685, HIDDEN + 25, "hidden state"),
        word(212, 372, "input"),
    ]
    content = "\n".join(parts)
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 750 400" role="img">\n'
        "<title>The LSTM cell: the memory c runs along the top, kept by f and added "
        "to by i times c̃; the hidden state h is what o lets out of it</title>\n"
        f"<style>{STYLE}</style>\n{content}\n</svg>\n",
        encoding="utf-8",
    )


def wire(*points, css="", tip=True):
    """A line through the points, with an arrow's tip at its end."""
    line = " ".join(f"{x},{y}" for x, y in points)
    drawn = f'<polyline class="{f"wire {css}".strip()}" points="{line}"/>'
    if not tip:
        return drawn
    (x, y), (x_end, y_end) = points[-2:]
    turn = {(1, 0): 0, (0, 1): 90, (-1, 0): 180, (0, -1): 270}[
        _sign(x_end - x), _sign(y_end - y)
    ]
    return (
        f'{drawn}<path class="tip" d="M1,0 l-11,-6 v12 z" '
        f'transform="translate({x_end},{y_end}) rotate({turn})"/>'
    )


def _sign(number):
    return (number > 0) - (number < 0)


def joint(x, y, sign):
    return (
        f'<circle class="joint" cx="{x}" cy="{y}" r="14"/><text x="{x}" y="{y}">'
        f"{sign}</text>"
    )


def gate(x, name, activation):
    return (
        f'<g class="gate"><rect x="{x - 32}" y="{GATE - 25}" width="64" height="50" '
        f'rx="8" fill="{COLOURS[name]}"/>'
        f'<text class="letter" x="{x}" y="{GATE - 7}">{name}</text>'
        f'<text class="word" x="{x}" y="{GATE + 14}">{activation}</text></g>'
    )


def letter(x, y, name, step):
    return (
        f'<text class="letter" x="{x}" y="{y}">{name}'
        f'<tspan class="sub" dy="6">{step}</tspan></text>'
    )


def word(x, y, text):
    return f'<text class="word" x="{x}" y="{y}">{text}</text>'


if __name__ == "__main__":
    main()
