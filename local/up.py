"""`./dev up`: everything on this machine, until Ctrl-C."""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from local import web
from local.data_folder import DataFolder
from local.output import show
from local.service import House, Service
from local.supervisor import Failure, Supervisor
from shared import settings


async def up(house: House, folder: DataFolder, port: int) -> int:
    """Run the service until a signal comes; the exit code."""
    service = Service(house, folder, port, settings.given())
    supervisor = Supervisor(
        house.root, service.environ(), show, remove=service.scratch, locks=[folder.lock], question=house.question()
    )

    async def serve() -> int:
        for line in how_it_draws(service):
            show(line)
        await service.start(supervisor)
        for line in how_to_use(service):
            show(line)
        await asyncio.Event().wait()  # until a signal cancels us
        return 0

    return await supervisor.supervise(serve)


def how_it_draws(service: Service) -> list[str]:
    """Who makes the pictures: said before anything else, since one of them costs money."""
    how = {"diffusers": _how_the_card_draws, "dataoorts": _how_the_vendor_draws, "automatic1111": _how_the_server_draws}
    return [line for backend, lines in how.items() if backend in service.settings.backends for line in lines(service)]


def _how_the_card_draws(service: Service) -> list[str]:
    return [f"Pictures are drawn on this machine, by {service.settings.gpu_model}; reading it takes a while."]


def _how_the_server_draws(service: Service) -> list[str]:
    url = service.settings.automatic1111_url
    if service.settings.automatic1111_sandbox:
        return [f"SANDBOX: at {url} a stand-in draws for `automatic1111`. Its pictures say SANDBOX, and cost nothing."]
    return [f"Pictures of `automatic1111` are drawn by the server at {url}, and cost nothing."]


def _how_the_vendor_draws(service: Service) -> list[str]:
    if not service.settings.sandbox:
        return [f"DATAOORTS_API_KEY is set: pictures come from {service.settings.dataoorts_url} and cost money."]
    where = "here" if service.absent.vendor else f"at {service.settings.dataoorts_url}"
    return [
        f"SANDBOX: no DATAOORTS_API_KEY is set, so a stand-in {where} draws the pictures. They say SANDBOX,",
        "and cost nothing; prices are counted as the vendor would take them.",
    ]


def how_to_use(service: Service) -> list[str]:
    """What a newcomer pastes first."""
    bearer = f"-H 'Authorization: Bearer {service.api_key}'"
    submit = '{"input": {"prompt": "futuristic spacecraft"}}'
    return [
        "",
        f"Ready on {service.url}",
        f"Key       {service.api_key}",
        f"Docs      {service.url}/docs",
        "",
        "Submit a job, and look at what becomes of it with the id from the answer:",
        f"curl -sS {service.url}/v1/jobs {bearer} -H 'Content-Type: application/json' -d '{submit}'",
        f"curl -sS {service.url}/v1/jobs/JOB_ID {bearer}",
        f"curl -sS {service.url}/v1/jobs/JOB_ID/image {bearer} -o picture.png",
        "",
        "Ctrl-C stops everything.",
    ]


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port: a number from 1 to 65535")
    return int(text)


def main(arguments: Sequence[str] | None = None, house: House | None = None) -> int:
    """Read the command line and run; the exit code."""
    parser = argparse.ArgumentParser(prog="./dev up", description=__doc__, allow_abbrev=False)
    parser.add_argument("--port", type=_port, default=8000, help="the API's port on 127.0.0.1 (default: 8000)")
    parser.add_argument(
        "--data", type=Path, help="the data folder (default: DARKROOM_DATA_DIR, or data in the checkout)"
    )
    parser.add_argument("--caller", type=Path, default=Path(), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    house = house or House()
    try:
        data = options.data or settings.given().get("DARKROOM_DATA_DIR")
        folder = DataFolder((options.caller / data if data else house.root / "data").resolve())
        if obstacle := web.why_not(options.port):
            raise Failure(f"port {options.port} can't be used ({obstacle}); choose another one with --port")
        return asyncio.run(up(house, folder, options.port))
    except settings.SettingsError as error:
        print(f"darkroom can't start:\n{error}", file=sys.stderr)
        return 2
    except Failure as error:
        print(f"darkroom: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # nobody reads what we say
        return 1
    except KeyboardInterrupt:  # before the supervisor listens for it
        return 0


if __name__ == "__main__":
    sys.exit(main())
