"""The models: what each takes, within which limits, at what price. Data; adding a model is adding an entry.

Source of the vendor's limits: docs.dataoorts.com, the pages of its image models, as of 2026-05-05. Limits
marked *ours* are narrower, so that every backend can serve what was accepted. Prices are the vendor's list
price in USD an image at the time the entry was written; the vendor has changed them before, so the setting
PRICES overrides them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True)
class Text:
    min_length: int
    max_length: int
    required: bool = False


@dataclass(frozen=True)
class Number:
    """A number within limits, both included. `default` None: left to the vendor, or drawn (a seed)."""

    minimum: int | float
    maximum: int | float
    default: int | float | None
    whole: bool = True
    multiple_of: int | None = None


@dataclass(frozen=True)
class Model:
    name: str
    title: str
    parameters: Mapping[str, Text | Number]
    price_usd: Decimal
    backends: tuple[str, ...]
    #: Those of them that can start from an image, with a mask or without.
    alters: tuple[str, ...]
    #: Where the vendor calls a parameter something else than we do.
    vendor_names: Mapping[str, str]
    #: What the vendor makes when the model takes no width and height; None: it makes what was asked.
    fixed_size: tuple[int, int] | None = None


PROMPT = Text(2, 2048, required=True)  # maximum: ours
NEGATIVE_PROMPT = Text(0, 2048)  # maximum: ours
SIDE = Number(256, 2048, 512, multiple_of=8)  # steps of 8: ours (the VAE's), the default too (the vendor names none)
SEED = Number(0, 2**32 - 1, None)  # range: ours
GUIDANCE = Number(0, 30, 7.5, whole=False)  # range: ours

_SDXL: Mapping[str, Text | Number] = {
    "prompt": PROMPT,
    "negative_prompt": NEGATIVE_PROMPT,
    "width": SIDE,
    "height": SIDE,
    "num_steps": Number(1, 20, 20),
    "guidance": GUIDANCE,
    "seed": SEED,
}

MODELS: Mapping[str, Model] = {
    model.name: model
    for model in (
        Model(
            name="stabilityai/stable-diffusion-xl-base-1.0",
            title="Stable Diffusion XL base 1.0",
            parameters=_SDXL,
            price_usd=Decimal("0.008"),
            backends=("dataoorts", "diffusers", "automatic1111"),
            alters=("diffusers", "automatic1111"),
            vendor_names={},
        ),
        Model(
            name="bytedance/stable-diffusion-xl-lightning",
            title="Stable Diffusion XL Lightning",
            parameters=_SDXL,
            price_usd=Decimal("0.0011"),
            backends=("dataoorts",),
            alters=(),
            vendor_names={},
        ),
        Model(
            name="lykon/dreamshaper-8-lcm",
            title="DreamShaper 8 LCM",
            # The vendor lists no seed for it: the picture can't be made again.
            parameters={name: limits for name, limits in _SDXL.items() if name != "seed"},
            price_usd=Decimal("0.0010"),
            backends=("dataoorts",),
            alters=(),
            vendor_names={},
        ),
        Model(
            name="black-forest-labs/flux-1-schnell",
            title="FLUX.1 schnell",
            parameters={"prompt": PROMPT, "num_steps": Number(1, 8, 4), "seed": SEED},
            price_usd=Decimal("0.0012"),
            backends=("dataoorts",),
            alters=(),
            vendor_names={"num_steps": "steps"},
            fixed_size=(1024, 1024),
        ),
    )
}

DEFAULT_MODEL = next(iter(MODELS))

#: The backends that somebody sends a bill for. A card of one's own is paid already.
PAID = frozenset({"dataoorts"})


def price_usd(model: str, prices: Mapping[str, Decimal]) -> Decimal:
    """What one image of this model costs: the operator's price, else the list price."""
    return prices.get(model, MODELS[model].price_usd)


def cost(backend: str, model: str, prices: Mapping[str, Decimal]) -> int:
    """What one image of this model costs when this backend makes it, in millionths of a dollar."""
    return round(price_usd(model, prices) * 1_000_000) if backend in PAID else 0
