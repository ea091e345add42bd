"""Networks without memory for their parameters, to look at or to fill. Without torch at import: --help reads this."""

from contextlib import contextmanager


@contextmanager
def parameters_on_meta():
    """Parameters that modules are given meanwhile go to torch's meta device, but for lists of them, such as gates.

    Buffers stay where they are made, as a state dict does not have all of them.
    """
    from torch import nn

    register = nn.Module.register_parameter

    def register_empty(module, name, param):
        if param is not None and not isinstance(module, nn.ParameterList):
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_empty
    try:
        yield
    finally:
        nn.Module.register_parameter = register
