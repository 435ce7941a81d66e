"""What every operator promises, as tests that an operator's test module inherits.

class TestMyOperator(OperatorContract):
    name = "my_operator"
    ...  # the attributes and methods that `Operator` describes
"""

from .cuda import CudaContract
from .integration import IntegrationContract
from .numerics import NumericsContract


class OperatorContract(NumericsContract, IntegrationContract, CudaContract):
    """Everything operators.md calls a contract; subclasses describe their operator."""
