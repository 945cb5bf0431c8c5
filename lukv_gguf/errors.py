"""The error that a user sees, and those that a damaged file raises."""

import lzma
import struct
import zipfile
import zlib


class LukvError(Exception):
    """Bad input or a bad environment. The message is one line: what is wrong, and what to do."""


UNREADABLE = (OSError, ValueError, EOFError, KeyError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
"""What numpy and zipfile raise for a damaged .npz; a flipped bit can ask for encryption or any compression."""
UNREADABLE_RECORD = (*UNREADABLE, TypeError, AttributeError, MemoryError)
"""The same where the arrays are then taken apart."""
