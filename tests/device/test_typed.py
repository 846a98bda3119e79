"""Functions with a gradient of our own."""

import mlx.core as mx

from utils.device.typed import with_gradient


def test_the_backward_pass_is_the_one_that_is_given():
    def square(x):
        return x * x

    def gradient(primals, cotangent, output):
        assert output.item() == 9.0
        return 100 * cotangent * primals

    ours = with_gradient(square, gradient)
    value, slope = mx.value_and_grad(lambda x: 2 * ours(x))(mx.array(3.0))
    assert (value.item(), slope.item()) == (18.0, 600.0)
