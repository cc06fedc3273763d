"""`fastmix.nn.mhesa`, at its address in the published package."""

from fastmix.nn.mhesa import *  # noqa: F403
