"""Values of the content columns ``image`` and ``audio``: bytes of a file, or where it lies.

May import: the standard library.
"""

_MAX_REFERENCE_BYTES = 2048


def is_reference(value: str | bytes) -> bool:
    """Tell whether a value names a file instead of being one.

    In an event's rows a URI stands as its bytes. No picture or sound is printable text: their
    formats begin with, or soon hold, bytes that are none.

    Args:
        value: A value that is not empty.

    Returns:
        True for text, and for bytes that are nothing but a line of printable text.
    """
    if isinstance(value, str):
        return True
    if len(value) > _MAX_REFERENCE_BYTES:
        return False
    try:
        return value.decode().isprintable()
    except UnicodeDecodeError:
        return False


def is_remote(reference: str) -> bool:
    """Tell whether a path is a URI: what none of the jobs here follows."""
    return "://" in reference
