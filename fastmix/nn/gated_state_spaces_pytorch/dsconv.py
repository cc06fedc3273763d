"""`fastmix.nn.dsconv`, at its address in the published package."""

from fastmix.nn.dsconv import *  # noqa: F403
