"""Re-DMD distillation: a student that streams, a frozen teacher, a critic that follows the student, and a reward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import checks
from ..draws import Generators, draw, keyed_generator
from ..losses import FlowMatchSchedule, ReDMDLoss, critic_loss, effective_sample_size
from ..models.wan import CausalWan
from ..models.wrappers import adapters, full, is_sharded, plain_name, unwrapped
from .config import AUTOCAST, ReDMDConfig
from .guidance import predict_clean
from .rollout import Rollout, SelfForcingRollout

Prompts = Sequence[Any]  # texts, or whatever else the reward is told of each sample
Batch = tuple[torch.Tensor, Prompts]  # text embeddings [B, n, text_dim], and the prompts that they are of
_GENERATOR, _CRITIC = 0, 1  # phases of a step, for the keys of its random numbers


class ReDMDTrainer:
    """The training step of "Reward Forcing" (arXiv 2512.04678): rollout, scores, reward, Re-DMD; and the critic.

    Args:
        student: `CausalWan` to train. teacher: bidirectional, frozen here. critic: begins as the teacher's weights.
            All three on one device; under torch.distributed sharded by `shard`. They may be compiled, have frozen
            weights, or LoRA (peft); of DDP the model within is taken.
        uncond: embeddings ``[1, n, text_dim]`` of the negative prompt; None: no guidance.
        reward: ``reward(frames [B, F, C, H, W] in 0..1, prompts) -> [B]``; None: plain DMD. decode: latents to such
            frames. Neither is differentiated.
        config: settings.

    Attributes:
        step_index: steps done.
        ema: moving average of the student's weights, float32, by the plain model's names; None before it begins.
        unfinished: metrics of the student's part of a step whose critic's part failed; else None.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        student: CausalWan,
        teacher: CausalWan,
        critic: CausalWan,
        uncond: torch.Tensor | None,
        reward: Callable[[torch.Tensor, Prompts], torch.Tensor] | None = None,
        decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
        config: ReDMDConfig | None = None,
    ):
        self.config = config = ReDMDConfig() if config is None else config
        if reward is not None and decode is None:
            raise ValueError("decode must be given with reward: it makes the frames that are rewarded")
        student, teacher, critic = (
            unwrapped(name, model) for name, model in (("student", student), ("teacher", teacher), ("critic", critic))
        )
        if len({id(m) for m in (student, teacher, critic)}) < 3:
            raise ValueError("student, teacher and critic must be three models, got the same one twice")
        for model in (student, critic):
            list(adapters(model))  # what `save_trainer` would refuse is refused before anything is trained
        self.rank, self.world = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            for name, model in (("student", student), ("critic", critic)):
                if self.world > 1 and not all(is_sharded(p) for p in model.parameters()):
                    raise ValueError(f"{name} must be sharded (rfkernels.training.shard) to train on several ranks")
        self.device = student.device
        for name, model in (("teacher", teacher), ("critic", critic)):
            if model.device != self.device:
                raise ValueError(f"{name} must be on the student's device {self.device}, got {model.device}")
            for size in ("in_channels", "text_dim"):
                own, got = getattr(student.config, size), getattr(model.config, size)
                if own != got:
                    raise ValueError(f"{name} must have the student's {size}={own}, got {got}")
        if uncond is not None:
            checks.embeddings("uncond", uncond, self.device)
            checks.shape("uncond", uncond, batch=1, tokens=None, text_dim=teacher.config.text_dim)
        self.student, self.teacher, self.critic = student, teacher.requires_grad_(False).eval(), critic
        self.uncond, self.reward, self.decode = uncond, reward, decode
        self.loss = ReDMDLoss(config.beta, config.guidance_scale, config.fake_guidance_scale, config.max_weight)
        self.schedule = FlowMatchSchedule(config.shift)
        autocast = AUTOCAST[config.autocast]
        dtype = {} if autocast is None else {"dtype": autocast}
        self.rollout = SelfForcingRollout(student, **(config.rollout | dtype))
        # Taken once: what FSDP2 shows as parameters changes around a pass, the optimisers want the sharded ones.
        self.weights, self.critic_weights = (
            {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
            for model in (student, critic)
        )
        self.optimizer, self.critic_optimizer = (
            torch.optim.AdamW(list(weights.values()), lr, config.betas, weight_decay=config.weight_decay)
            for weights, lr in ((self.weights, config.lr), (self.critic_weights, config.critic_lr))
        )
        self.step_index = 0
        self.ema: dict[str, torch.Tensor] | None = None
        self.unfinished: dict[str, torch.Tensor] | None = None

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(self, batches: Sequence[Batch], critic_batches: Sequence[Batch] | None = None) -> dict[str, torch.Tensor]:
        """One update of the critic, before it, in every ``generator_every``-th step from the first, one of the student.

        Args:
            batches: ``accumulation`` micro-batches of one size, ``(context [B, n, text_dim], prompts)``. How samples
                are divided into micro-batches, and over ranks, changes nothing but rounding.
            critic_batches: for the critic, default the same prompts (with other noise).

        Returns:
            metrics, detached tensors on the device: ``critic_loss``, ``critic_grad_norm`` (before clipping), and in a
            student's step ``loss``, ``grad_norm``, ``dmd_gradient_norm`` (of the loss in a sample, mean over samples),
            ``reward``, ``weight`` (as used) and ``effective_sample_size``. Losses, rewards, weights and
            dmd_gradient_norm are of this rank's samples.

        The critic learns from the student as it is after its update. So a step can fail between the two: the next call
        then finishes it, by the critic's part alone, and takes the path of a step that did not fail.

        Raises:
            ValueError: batches that do not fit, a non-finite reward. FloatingPointError: a non-finite gradient. The
                network concerned, its optimiser and ``step_index`` are unchanged then.
        """
        critic_batches = batches if critic_batches is None else critic_batches
        self._check_batches("batches", batches)
        self._check_batches("critic_batches", critic_batches)
        if self.unfinished is None:
            due = self.step_index % self.config.generator_every == 0
            self.unfinished = self._train_generator(batches) if due else {}
        metrics = self.unfinished | self._train_critic(critic_batches)
        self.unfinished = None
        self.step_index += 1
        if self.ema is None and self.step_index >= self.config.ema_start:
            # Clones keep the sharding of FSDP2's parameters.
            self.ema = {name: p.detach().float().clone() for name, p in self.weights.items()}
        return metrics

    def train(
        self, data: Callable[[int], Sequence[Batch]], steps: int | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the metrics of each step until ``step_index`` reaches ``steps`` (default total_steps).

        data: the micro-batches of a step by its number, so that a resumed run sees the same.
        """
        if not callable(data):
            raise TypeError(
                f"data must be a function of the step's number that returns its micro-batches, a list of (embeddings, "
                f"prompts), got {type(data).__name__}"
            )
        while self.step_index < (self.config.total_steps if steps is None else steps):
            yield self.step(data(self.step_index))

    def _train_generator(self, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        losses, seen, parts = [], [], len(batches) * self.world
        with self._gradients_of(self.optimizer):
            for index, batch in enumerate(batches):
                loss, metrics = self._generator_loss(index, *batch)
                (loss / len(batches)).backward()
                losses.append(loss.detach())
                seen.append(metrics)
            weight = torch.cat([m["weight"] for m in seen])
            everyone = self._gather(weight)
            scale: float | torch.Tensor = 1.0
            if self.config.normalize_weights:
                scale = everyone.mean()
                # The gradient is linear in the weights: dividing it by their mean now, when all of them are known, is
                # dividing each of them.
                for p in self.weights.values():
                    if p.grad is not None:
                        p.grad.div_(scale)
            norm = self._update("student", self.weights, self.optimizer)
        if self.ema is not None:
            with torch.no_grad():
                for name, p in self.weights.items():
                    self.ema[name].lerp_(p.detach().float(), 1 - self.config.ema_decay)
        metrics = {
            "loss": torch.stack(losses).mean() / scale,
            "grad_norm": norm,
            # Of the whole step's loss, not of a micro-batch's.
            "dmd_gradient_norm": torch.cat([m["gradient_norm"] for m in seen]).mean() / (scale * parts),
            "reward": torch.cat([m["reward"] for m in seen]),
            "weight": weight / scale,
            "effective_sample_size": effective_sample_size(everyone),
        }
        return metrics

    def _generator_loss(
        self, index: int, context: torch.Tensor, prompts: Prompts
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config, (generators, exits) = self.config, self._generators(_GENERATOR, index, len(context))
        with self._autocast():
            clip = self._roll(context, generators, exits)
        x = clip.graded
        reward = self._reward(x.detach(), prompts)
        with torch.no_grad(), self._autocast():
            times = self.schedule.random_timesteps(len(x), config.timestep_bounds, generators, x.device)
            noisy = self.schedule.add_noise(x, draw(torch.randn, x.shape, generators, x.device, x.dtype), times)
            uncond = None if self.uncond is None else self.uncond.expand(len(x), -1, -1)
            fake_uncond = None
            fake = predict_clean(self.critic, noisy, times, context)
            if uncond is not None and config.fake_guidance_scale:
                fake_uncond = predict_clean(self.critic, noisy, times, uncond)
            real = predict_clean(self.teacher, noisy, times, context)
            real_uncond = None if uncond is None else predict_clean(self.teacher, noisy, times, uncond)
        loss, metrics = self.loss(x, fake, real, real_uncond, reward, fake_uncond=fake_uncond, return_metrics=True)
        return loss, metrics | {"reward": reward}

    def _train_critic(self, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        losses = []
        with self._gradients_of(self.critic_optimizer):
            for index, (context, _) in enumerate(batches):
                generators, exits = self._generators(_CRITIC, index, len(context))
                with torch.no_grad(), self._autocast():
                    clip = self._roll(context, generators, exits)
                x = clip.graded
                times = self.schedule.random_timesteps(len(x), self.config.timestep_bounds, generators, x.device)
                with self._autocast():
                    loss = critic_loss(self.critic, x, context, times, generator=generators)
                (loss / len(batches)).backward()
                losses.append(loss.detach())
            norm = self._update("critic", self.critic_weights, self.critic_optimizer)
        return {"critic_loss": torch.stack(losses).mean(), "critic_grad_norm": norm}

    def _roll(self, context: torch.Tensor, generators: Generators, exits: torch.Generator) -> Rollout:
        c = self.config
        return self.rollout(context, c.num_frames, c.height, c.width, generator=generators, exit_generator=exits)

    @torch.no_grad()
    def _reward(self, latents: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        if self.reward is None or self.decode is None:
            return torch.zeros(len(latents), device=latents.device)
        reward = self.reward(self.decode(latents), prompts)
        problem = None
        if not isinstance(reward, torch.Tensor) or reward.shape != (len(latents),):
            problem = f"shape {tuple(reward.shape)}" if isinstance(reward, torch.Tensor) else type(reward).__name__
        elif not reward.isfinite().all():
            problem = str(reward.tolist())
        # Every rank must stop, or the others would wait for it in their next collective.
        if self._gather(torch.tensor([problem is not None], device=latents.device)).any():
            raise ValueError(f"reward must be finite, one number for each of {len(latents)} samples, got {problem}")
        return reward.to(latents)

    # --- parts of it --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _gradients_of(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Fresh gradients, which are gone afterwards, whatever happens."""
        optimizer.zero_grad(set_to_none=True)
        try:
            yield
        finally:
            optimizer.zero_grad(set_to_none=True)

    def _update(self, name: str, weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> torch.Tensor:
        limit = self.config.max_grad_norm
        norm = nn.utils.clip_grad_norm_(weights.values(), float("inf") if limit is None else limit)
        norm = full(norm)
        if not norm.isfinite():
            raise FloatingPointError(f"the {name}'s gradient must be finite, got norm {norm.item()}")
        optimizer.step()
        return norm.detach()

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.config.autocast]
        # Without its cache: a weight cast within no_grad must not serve a pass that wants gradients.
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None, cache_enabled=False)

    def _generators(self, phase: int, index: int, batch: int) -> tuple[list[torch.Generator], torch.Generator]:
        """Of each sample of a micro-batch, by its number among all of the step's; and of the choice of steps."""
        first = (index * self.world + self.rank) * batch
        key = (self.config.seed, self.step_index, phase)
        return [keyed_generator(*key, 1 + first + i) for i in range(batch)], keyed_generator(*key, 0)

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        """``[n]`` of every rank, joined."""
        if self.world == 1:
            return x
        everyone = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(everyone, x.contiguous())
        return torch.cat(everyone)

    def _check_batches(self, name: str, batches: Sequence[Batch]) -> None:
        wanted = f"{name} must be a list of micro-batches, each a pair (embeddings [B, n, text_dim], prompts)"
        if not isinstance(batches, list | tuple):
            raise TypeError(f"{wanted}, got {type(batches).__name__}")
        if len(batches) == 2 and not isinstance(batches[0], list | tuple):
            raise TypeError(f"{wanted}, got one pair: give [(embeddings, prompts)]")
        if len(batches) != self.config.accumulation:
            raise ValueError(f"{name} must be accumulation={self.config.accumulation} of them, got {len(batches)}")
        for batch in batches:
            if not isinstance(batch, list | tuple) or len(batch) != 2 or isinstance(batch[1], str):
                got = (
                    "one text as its prompts"
                    if isinstance(batch, list | tuple) and len(batch) == 2
                    else repr(type(batch))
                )
                raise TypeError(f"{wanted}, got {got}")
            context, prompts = batch
            checks.embeddings(f"{name}' context", context, self.device)
            size = len(batches[0][0])
            text_dim = self.student.config.text_dim
            checks.shape(f"{name}' context", context, batch=size, tokens=None, text_dim=text_dim)
            if len(prompts) != size:
                raise ValueError(f"{name} must have one prompt for each of {size} contexts, got {len(prompts)}")
