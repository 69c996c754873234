"""The mesh of processes that train one model together, written `data=2`. Part of sae_fast.config.

An axis says what is divided: `data` the batches of a step, `latents` the model, `layers` the
trainings of a sweep and of several hook points. `data=2,latents=2` divides both among four.
"""

from __future__ import annotations

AXES = ("data", "latents", "layers")


def parsed_mesh(text: str | None) -> dict[str, int]:
    """Return the sizes of a mesh by the names of its axes; empty for None.

    Raises ValueError for what is no mesh, and for axes that there are not.
    """
    sizes: dict[str, int] = {}
    for part in [] if text is None else text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES:
            raise ValueError(
                f"mesh = {text!r} must name axes with their sizes, such as data=2; the axes are "
                f"{', '.join(AXES)}, got {name!r}"
            )
        if name in sizes:
            raise ValueError(f"mesh = {text!r} has the axis {name} twice")
        if not (size.isascii() and size.isdigit() and int(size) > 0):
            raise ValueError(
                f"mesh = {text!r}: the size of {name} must be a whole number of at least 1, "
                f"got {size!r}"
            )
        sizes[name] = int(size)
    several = [name for name, size in sizes.items() if size > 1]
    if "layers" in several and len(several) > 1:
        raise ValueError(
            f"mesh = {text!r}: processes that divide trainings divide nothing else, give "
            f"layers={sizes['layers']} alone"
        )
    return sizes


def divides(text: str | None, *axes: str) -> bool:
    """Return whether several processes of a mesh divide what one of these axes says."""
    return any(size > 1 and name in axes for name, size in parsed_mesh(text).items())
