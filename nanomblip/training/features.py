"""What the ViT sees of a batch: computed at each step, or once for all and kept, since a frozen ViT sees the same
every time."""

import random

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from nanomblip.data.mixture import Batches
from nanomblip.model.mblip import MBLIP
from nanomblip.training.state import begin_worker

LARGEST_CACHE = 4_000_000_000  # bytes


class LiveFeatures:
    """features(batch) -> float (B, I, N, Dv), by a run of the ViT, with gradients where it is trained."""

    def __init__(self, model: MBLIP):
        self.model = model

    def __call__(self, batch: dict) -> torch.Tensor:
        with torch.set_grad_enabled(self.model.vit.patch_embed.weight.requires_grad):
            return self.model.image_features(batch["image"])


class CachedFeatures:
    """features(batch) -> float (B, 1, N, Dv), from a cache of all training pictures in `views` random views: fp16
    (P, views, N, Dv), on the GPU where it takes at most half of what is free there, else on the CPU.

    noise: Gaussian noise of up to this times the standard deviation over pictures, its strength drawn for each
    picture. ValueError if the cache would take more than LARGEST_CACHE bytes.
    """

    @torch.no_grad()
    def __init__(self, model: MBLIP, batches: Batches, device: torch.device, noise: float = 0.0):
        mixture, vit = batches.mixture, model.cfg.vit
        size = len(mixture.cells) * batches.views * vit.tokens * vit.width * 2
        if size > LARGEST_CACHE:
            raise ValueError(
                f"--views {batches.views}: a cache of what the ViT sees would take {size / 1e9:.1f} GB; give --views 0"
            )
        task = (
            "caption" if mixture.tasks == ["caption"] else "several"
        )  # one view serves all tasks: mirrored for captions only
        fits = device.type == "cuda" and 2 * size < torch.cuda.mem_get_info()[0]
        self.device, home = device, device if fits else torch.device("cpu")
        shape = len(mixture.cells), batches.views, vit.tokens, vit.width
        self.cache = torch.empty(shape, dtype=torch.float16, device=home)
        self.row = torch.full((len(mixture.emoji.cells),), -1)  # of each picture in the cache
        self.row[mixture.cells] = torch.arange(len(mixture.cells))
        jobs = [(p, v) for p in mixture.cells for v in range(batches.views)]
        for i in tqdm(range(0, len(jobs), 256), desc="frozen ViT", leave=False):
            part = jobs[i : i + 256]
            drawn = [random.Random(f"{mixture.seed}/cached/{p}/{v}") for p, v in part]
            image = torch.stack([batches.augmented(p, rng, task) for (p, _), rng in zip(part, drawn)])[:, None]
            pictures, views = torch.tensor(part).T
            self.cache[self.row[pictures], views] = model.image_features(image.to(device))[:, 0].half().to(home)
        places = self.cache.unbind(2)  # one at a time, which takes less memory
        spread = torch.stack([place.float().std((0, 1)) for place in places])
        self.noise = noise * spread.to(device)  # (N, Dv)

    def __call__(self, batch: dict) -> torch.Tensor:
        seen = self.cache[self.row[batch["picture"].cpu()], batch["view"].cpu()]  # (B, N, Dv)
        seen = seen[:, None].to(self.device).float()  # (B, 1, N, Dv)
        if self.noise.any():
            strength = torch.rand(len(seen), 1, 1, 1, device=self.device)
            seen = seen + self.noise * torch.randn_like(seen) * strength
        return seen


class Loader:
    """The micro-batches of one stage from number `start` on, prepared by `workers` processes; next(loader) ->
    tensors on `device`.

    A worker that died is a ValueError: the run is whole up to the last step, and can be gone on with.
    """

    def __init__(self, batches: torch.utils.data.Dataset, start: int, workers: int, device: torch.device):
        numbers = range(start, 2**62)
        options = dict(batch_size=None, sampler=numbers, num_workers=workers, worker_init_fn=begin_worker,
                       pin_memory=device.type == "cuda")  # fmt: skip
        self.batches, self.device = iter(DataLoader(batches, **options)), device

    def __next__(self) -> dict[str, torch.Tensor]:
        try:
            batch = next(self.batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise WorkerDied(
                "a loader worker was killed, perhaps because memory ran out; give fewer --workers"
            ) from None
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}


class WorkerDied(ValueError):
    """A process that prepares batches ended by itself."""
