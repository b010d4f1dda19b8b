"""The options of several commands that choose where work runs, and their joint meaning."""

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from tempoquant.cli.options import check_devices

if TYPE_CHECKING:
    from tempoquant.engines import Engine, RayCluster


class EngineName(str, Enum):
    """The names of the engines of `tempoquant.engines`."""

    LOCAL = "local"
    RAY = "ray"


EngineOption = Annotated[
    EngineName,
    typer.Option(
        "--engine", help="local: a process for each --device here; ray: a worker for each GPU of a Ray cluster."
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="HOST:PORT", help="Address of the Ray cluster; default: the one this machine belongs to."
    ),
]
Workers = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="D[,D]",
        help="cpu, cuda, or several such as cuda:0,cuda:1: a process for each. With Ray cpu or cuda.",
    ),
]


def cluster_of(engine: EngineName, address: str | None, device: str | None) -> "RayCluster | None":
    """Return the cluster that the options name; None for this machine. Raises typer.BadParameter
    for a contradiction.
    """
    if engine is EngineName.LOCAL:
        if address is not None:
            raise typer.BadParameter("only a Ray cluster has an address: add --engine ray.", param_hint="'--address'")
        check_devices(device)
        return None
    from tempoquant.engines import RayCluster
    from tempoquant.errors import SettingsError

    try:
        return RayCluster(device or "cuda", address)
    except SettingsError as error:
        raise typer.BadParameter(str(error), param_hint="'--device'") from error


def engine_of(engine: EngineName, address: str | None, device: str | None) -> "Engine":
    """Return the engine that the options name. Raises typer.BadParameter, or SettingsError for
    devices that do not match.
    """
    from tempoquant.device import default_device
    from tempoquant.engines import Local

    return cluster_of(engine, address, device) or Local(tuple((device or default_device()).split(",")))
