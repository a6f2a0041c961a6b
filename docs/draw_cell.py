"""Draw the LSTM cell of `docs/equations.md` as `images/cell.svg`.

    python docs/draw_cell.py

The image follows the light or dark theme of the reader's system.
"""

from pathlib import Path

PATH = Path(__file__).parent / "images" / "cell.svg"

# Heights of the cell state, the products, the gates and the hidden state.
STATE, PRODUCT, GATE, HIDDEN = 80, 160, 225, 310
FORGET, INPUT, CANDIDATE, OUTPUT = 200, 300, 400, 500
ADD = (INPUT + CANDIDATE) // 2
OUT = 570

STYLE = """
  svg { --ink: #1b1f24; --faint: #57606a; --card: #f3f4f6; --back: #ffffff; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e6e9ed; --faint: #a3acb8; --card: #2b303b; --back: #1e2129; }
  }
  svg { background: var(--back); } /* readable where the page has another theme */
  .card { fill: var(--card); }
  .wire { fill: none; stroke: var(--ink); stroke-width: 2; }
  .state { stroke-width: 4; }
  .tip { fill: var(--ink); }
  .joint { fill: var(--back); stroke: var(--ink); stroke-width: 2; }
  text { fill: var(--ink); text-anchor: middle; dominant-baseline: central;
    font: 22px "Times New Roman", "Liberation Serif", serif; }
  .symbol { font-style: italic; }
  .word { font: 14px system-ui, "DejaVu Sans", sans-serif; fill: var(--faint); }
  .gate text { fill: #ffffff; }
  .gate .word { font-size: 11px; }
  .sub { font-size: 14px; }
"""
# The gate colors of the plots, dark enough for white symbols.
COLORS = {"f": "#0072B2", "i": "#9C6B00", "c̃": "#B84E00", "o": "#007A59"}


def main(path=PATH):
    parts = [
        '<rect class="card" x="110" y="35" width="520" height="305" rx="18"/>',
        # c_t = f * c_{t-1} + i * c̃
        wire((30, STATE), (720, STATE), css="state"),
        # The inputs of all four gates: x_t and h_{t-1}.
        wire((30, HIDDEN), (OUTPUT, HIDDEN), (OUTPUT, GATE), tip=False),
        wire((150, 385), (150, HIDDEN), tip=False),
        *(wire((x, HIDDEN), (x, GATE), tip=False) for x in (FORGET, INPUT, CANDIDATE)),
        wire((FORGET, GATE), (FORGET, STATE + 15)),
        wire((INPUT, GATE), (INPUT, PRODUCT), (ADD - 15, PRODUCT)),
        wire((CANDIDATE, GATE), (CANDIDATE, PRODUCT), (ADD + 15, PRODUCT)),
        wire((ADD, PRODUCT), (ADD, STATE + 15)),
        # h_t = o * tanh(c_t)
        wire((OUT, STATE), (OUT, PRODUCT - 15)),
        wire((OUTPUT, GATE), (OUTPUT, PRODUCT), (OUT - 15, PRODUCT)),
        wire((OUT, PRODUCT), (OUT, HIDDEN), (720, HIDDEN)),
        joint(FORGET, STATE, "×"),
        joint(ADD, PRODUCT, "×"),
        joint(ADD, STATE, "+"),
        joint(OUT, PRODUCT, "×"),
        f'<rect class="joint" x="{OUT - 27}" y="{118 - 14}" width="54" height="28" '
        'rx="14"/>',
        f'<text class="word" x="{OUT}" y="118">tanh</text>',
        gate(FORGET, "f", "sigmoid"),
        gate(INPUT, "i", "sigmoid"),
        gate(CANDIDATE, "c̃", "tanh"),
        gate(OUTPUT, "o", "sigmoid"),
        symbol(60, STATE - 25, "c", "t−1"),
        symbol(685, STATE - 25, "c", "t"),
        symbol(60, HIDDEN - 25, "h", "t−1"),
        symbol(685, HIDDEN - 25, "h", "t"),
        symbol(172, 372, "x", "t"),
        word(685, STATE + 25, "cell state"),
        word(685, HIDDEN + 25, "hidden state"),
        word(212, 372, "input"),
    ]
    content = "\n".join(parts)
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 750 400" role="img">\n'
        "<title>The LSTM cell: f scales the previous cell state, i times c̃ is added "
        "to it, and o scales its tanh to give the hidden state</title>\n"
        f"<style>{STYLE}</style>\n{content}\n</svg>\n",
        encoding="utf-8",
    )


def wire(*points, css="", tip=True):
    """Return a line through the points, with an arrowhead at its end."""
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
        f'rx="8" fill="{COLORS[name]}"/>'
        f'<text class="symbol" x="{x}" y="{GATE - 7}">{name}</text>'
        f'<text class="word" x="{x}" y="{GATE + 14}">{activation}</text></g>'
    )


def symbol(x, y, name, step):
    return (
        f'<text class="symbol" x="{x}" y="{y}">{name}'
        f'<tspan class="sub" dy="6">{step}</tspan></text>'
    )


def word(x, y, text):
    return f'<text class="word" x="{x}" y="{y}">{text}</text>'


if __name__ == "__main__":
    main()
