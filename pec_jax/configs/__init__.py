"""The configs we ship.

In a clone they lie in the folder `configs/` at its top, to which this package points; in an
installed wheel that folder is this package (see setup.py).
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "configs")]
