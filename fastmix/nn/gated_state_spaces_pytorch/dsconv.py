"""`fastmix.nn.dsconv`, at its address in the published package."""

from fastmix.nn._helpers import append_dims as append_dims
from fastmix.nn._helpers import exists as exists
from fastmix.nn.dsconv import *  # noqa: F403
