"""Photos and masks: decoding, screening, encoding, run lengths, polygons."""
