"""The least arithmetic and memory traffic of the network, a reference for the GPU benchmarks."""

from service.settings import DEFAULT_MODEL
from tests.benchmarks.gpu_cost import network_cost

NETWORK = DEFAULT_MODEL / "network.onnx"


def test_the_default_networks_multiply_adds() -> None:
    """35.92 G at 512x512, proportional to the area except where a layer sees the whole image."""
    square, landscape = network_cost(NETWORK, (512, 512)), network_cost(NETWORK, (384, 512))
    assert round(square.multiply_adds / 1e9, 2) == 35.92
    assert abs(landscape.multiply_adds / square.multiply_adds - 0.75) < 1e-4


def test_traffic_is_activations_by_batch_and_weights_by_run() -> None:
    """A batch of sixteen reads the weights once; the image is uint8 and the logits float32."""
    cost = network_cost(NETWORK, (512, 512))
    assert cost.fixed_bytes == 512 * 512 * 3 + 64 * 64 * 21 * 4
    assert cost.bytes_of(16, 2) - 16 * cost.bytes_of(1, 2) == -15 * 2 * cost.weights
    # ResNet-50 has 23.5 million weights in its convolutions; the head has the rest.
    assert 23.4e6 < cost.weights < 30e6
