"""What a picture that we encoded says of itself: JSON in a text of the PNG, which goes wherever the picture goes.

worker/backends/provenance.py writes it, and what other tools read beside it; api/provenance.py looks up what is stored
nowhere else.
"""

import json
from io import BytesIO
from typing import Any

from PIL import Image

KEYWORD = "darkroom"


def said_by(data: bytes) -> dict[str, Any]:
    """What stands in a PNG under our keyword; {} if nothing does. Anybody can write there: it proves nothing."""
    try:
        with Image.open(BytesIO(data), formats=("PNG",)) as image:  # reads the head, and decodes nothing
            said = json.loads(image.info.get(KEYWORD, ""))
    except (OSError, ValueError, TypeError, SyntaxError, RecursionError, Image.DecompressionBombError):
        return {}
    return said if isinstance(said, dict) else {}
