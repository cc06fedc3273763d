"""`fastmix.nn.gss`, at its address in the published package."""

from fastmix.nn._helpers import exists as exists
from fastmix.nn.gss import *  # noqa: F403
