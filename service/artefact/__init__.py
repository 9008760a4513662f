"""What the two halves share: the model contract, the manifest, VOC's labels, preprocessing."""
