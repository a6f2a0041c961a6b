"""Replace a method of one layer in one thread."""

import contextlib
import threading

_LOCK = threading.Lock()  # held only while a method is put in place or removed


class _Method:
    """A method that some threads replace; the others run the original."""

    def __init__(self, original):
        self.original = original
        self.replacements = {}  # thread -> function

    def __call__(self, *args, **kwargs):
        replacement = self.replacements.get(threading.get_ident())
        if replacement is None:
            return self.original(*args, **kwargs)
        return replacement(self.original, *args, **kwargs)


@contextlib.contextmanager
def replaced(layer, name, replacement, **attributes):
    """Replace a method of a layer in this thread, and leave the layer as it was.

    Calls become `replacement(original, *args, **kwargs)`. Meanwhile, other attributes
    are replaced in all threads.
    """
    thread, own = threading.get_ident(), vars(layer)
    with _LOCK:
        method = own.get(name)
        if not isinstance(method, _Method):
            method = _Method(getattr(layer, name))
            attributes[name] = method
            method.before = {key: own[key] for key in attributes if key in own}
            method.attributes = attributes
            own.update(attributes)  # Keras and torch track what `__setattr__` assigns
        outer = method.replacements.get(thread)
        method.replacements[thread] = replacement
    try:
        yield
    finally:
        with _LOCK:
            del method.replacements[thread]
            if outer is not None:
                method.replacements[thread] = outer
            if not method.replacements:
                for key in method.attributes:
                    del own[key]
                own.update(method.before)
