"""What the service and `models` share: contract, label set, manifest, VOC, preprocessing."""
