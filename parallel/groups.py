"""The old name of arcshard.parallel.groups; it works for one release."""

from utils.moved import moved

__all__ = ["Groups", "init_process_group", "resolve_group"]  # noqa: F822 - looked up below
__getattr__ = moved(__name__, "arcshard.parallel.groups")
