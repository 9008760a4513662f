"""The serving half: photos in, per-pixel PASCAL VOC classes out, over HTTP or from the shell."""

__version__ = "0.1.0"
