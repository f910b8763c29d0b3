"""What tells in a small run that a large one would be unstable: attention logits, log Z, gradients near AdamW's eps.

    per layer   max over heads and pairs that may be seen of q.k * scaling, as it enters the softmax
    output      mean log Z, Z = sum_j e^{z_j}, over scored tokens; z-loss = coefficient * mean (log Z)^2
    per kind    RMS of the gradient that the optimizer gets; RMS of Adam's m^ / (sqrt(v^) + eps) and of m^ / sqrt(v^)
    over runs   sensitivity = mean over learning rates of min(final loss, loss at initialisation) - best final loss

Two slow ways to diverge: attention logits grow until the softmax is one-hot (remedy: layer norm of queries and keys),
and output logits drift away from log probabilities, log Z far from 0 (remedy: `ZLossMixin`). A third is silent:
gradients fall with scale until eps outweighs sqrt(v^) and updates vanish (remedy: a smaller eps).

Small-scale proxies for large-scale Transformer training instabilities, arXiv 2309.14322. Maxima and log Z are in
float32, sums of squares in float32 for a tensor and float64 across tensors. The limits of the warnings are ours but
for the one on attention logits, 10^4, near which the paper's models became unstable (as recalled).
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.utils import logging

from ..compat import loss_shifts_labels, plain_optimizer, replaced, two_pass_optimizer
from ..optim._wrapper import total_norm
from ..registry import Method, Result
from ._attention_logits import AttentionLogits
from ._trajectory import CHUNK

logger = logging.get_logger(__name__)


@torch.no_grad()
def log_z_sums(logits: Tensor, labels: Tensor, ignore_index: int = -100, chunk: int = CHUNK) -> Tensor:
    """(sum of log Z, sum of (log Z)^2, count) [3] in float64 over the tokens with a label.

    Logits [..., vocab], labels [...] where they are predicted; `chunk` rows at a time are in float32.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    where = (labels.reshape(-1).to(logits.device) != ignore_index).nonzero()[:, 0]
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_z = [flat[part].to(wide).logsumexp(-1).double() for part in where.split(chunk)]
    log_z = torch.cat(log_z) if log_z else flat.new_zeros(0, dtype=torch.float64)
    return torch.stack([log_z.sum(), log_z.square().sum(), torch.tensor(float(len(where))).to(log_z)])


def adam_update(
    exp_avg: Tensor, exp_avg_sq: Tensor, step: float, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor]:
    """m^ / (sqrt(v^) + eps) and m^ / sqrt(v^) (0 where both are), of the moments after step number `step`."""
    mean = exp_avg.float() / (1 - betas[0] ** step)
    root = (exp_avg_sq.float() / (1 - betas[1] ** step)).sqrt()
    return mean / (root + eps), torch.where(root > 0, mean / root, 0.0)


def lr_sensitivity(losses: Sequence[float], initial_loss: float) -> float:
    """mean_i min(losses_i, initial_loss) - min_i losses_i over learning rates spaced evenly in their logarithm.

    A loss that is not a number counts as the loss at initialisation; so does one above it.
    """
    if not losses or not math.isfinite(initial_loss):
        raise ValueError(f"lr_sensitivity needs one loss or more and a finite initial_loss, got {initial_loss!r}.")
    kept = [min(x, initial_loss) if math.isfinite(x) else initial_loss for x in losses]
    return sum(kept) / len(kept) - min(kept)


def extrapolated_logit(parameters: Sequence[float], logits: Sequence[float], at: float) -> float:
    """The attention logit to expect at `at` parameters: log(logit) as a quadratic in log(parameters), least squares.

    Needs runs of three sizes or more, all at one learning rate, with logits above 0.
    """
    if len(parameters) != len(logits) or len(set(parameters)) < 3:
        raise ValueError(f"extrapolated_logit needs three sizes or more, got {len(set(parameters))}.")
    if not all(x > 0 for x in (*parameters, *logits, at)):
        raise ValueError("extrapolated_logit needs parameters and logits above 0: it works in their logarithms.")
    x = torch.tensor(parameters, dtype=torch.float64).log()
    powers = torch.stack([torch.ones_like(x), x - x.mean(), (x - x.mean()) ** 2], -1)
    target = torch.tensor(logits, dtype=torch.float64).log()[:, None]
    a, b, c = torch.linalg.lstsq(powers, target).solution[:, 0].tolist()
    z = math.log(at) - x.mean().item()
    return math.exp(a + b * z + c * z * z)


def parameter_kinds(model: nn.Module) -> dict[str, str]:
    """Name of each parameter -> `embedding`, `head` (the untied output layer), `norm`, `attention` or `dense`."""
    classes = {name: type(m).__name__.lower() for name, m in model.named_modules()}
    heads = [m.get_output_embeddings() for m in model.modules() if isinstance(m, PreTrainedModel)]
    heads = {id(head) for head in heads if head is not None}
    kinds = {}
    for name, _ in model.named_parameters():
        path = name.split(".")[:-1]
        above = [".".join(path[:i]) for i in range(1, len(path) + 1)]
        owner = model.get_submodule(".".join(path))
        if isinstance(owner, nn.Embedding):
            kinds[name] = "embedding"
        elif any(id(model.get_submodule(part)) in heads for part in above):
            kinds[name] = "head"
        elif "norm" in type(owner).__name__.lower():
            kinds[name] = "norm"
        else:
            kinds[name] = "attention" if any("attention" in classes[part] for part in above) else "dense"
    return kinds


class ProxyDiagnostics(TrainerCallback):
    """Logs what warns of instability: `trainer.add_callback(ProxyDiagnostics(trainer, every=100))`.

    `Trainer.log` gets, at each measured step: `attention_logit_max` and the same with `/<module>` for each layer;
    `output_log_z` and `output_z_loss`; `grad_rms/<kind>`, and with an Adam `update_rms/<kind>` and
    `update_kept/<kind>`, the share of the update's RMS that eps leaves. Training is the same bit for bit. Measured
    steps cost about the products q.k once more, others nothing. Micro-batches and processes count as one batch; padded
    queries and tokens without a label do not count. PEFT, DDP, gradient checkpointing and two-pass optimizers (whose
    second pass is not measured) work; a zeroth-order optimizer makes no training pass, and nothing is measured.

    Args:
        trainer (`Trainer`): To which the callback is added: only it can log.
        every (`int`, *optional*, defaults to 100): Steps between two measurements, from the first step on.
        attention (`bool`, *optional*, defaults to `True`): Measure attention logits.
        outputs (`bool`, *optional*, defaults to `True`): Measure log Z. Off for losses without logits (fused, Liger).
        gradients (`bool`, *optional*, defaults to `True`): Measure gradients and updates.
        z_coefficient (`float`, *optional*, defaults to 1e-4): Of the logged z-loss.
        attention_limit (`float`, *optional*, defaults to 1e4): Warn above this attention logit.
        log_z_limit (`float`, *optional*, defaults to 100): Warn above this |mean log Z|.
        eps_margin (`float`, *optional*, defaults to 10): Warn when a gradient's RMS is below this many eps.

    Raises:
        `ValueError`: A field out of range, or outputs without logits or labels that fit them.
        `NotImplementedError`: With `torch_compile` or DataParallel, or attention whose mask is no tensor (flex).
    """

    def __init__(
        self,
        trainer: Trainer,
        every: int = 100,
        *,
        attention: bool = True,
        outputs: bool = True,
        gradients: bool = True,
        z_coefficient: float = 1e-4,
        attention_limit: float = 1e4,
        log_z_limit: float = 100.0,
        eps_margin: float = 10.0,
    ):
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer is a {type(trainer).__name__} but must be the Trainer: only it can log.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r} but must be an integer >= 1.")
        limits = {"attention_limit": attention_limit, "log_z_limit": log_z_limit, "eps_margin": eps_margin}
        for name, value in {"z_coefficient": z_coefficient, **limits}.items():
            if not value >= 0:
                raise ValueError(f"{name} is {value!r} but must be >= 0.")
        if trainer.args.torch_compile and attention:
            raise NotImplementedError("Attention logits are not seen with torch_compile: pass attention=False.")
        if trainer.args.n_gpu > 1:
            raise NotImplementedError("ProxyDiagnostics does not run with DataParallel: start one process per device.")
        self.trainer, self.every, self.z_coefficient, self.limits = trainer, every, z_coefficient, limits
        self.attention, self.outputs, self.gradients = attention, outputs, gradients
        self.undo = contextlib.ExitStack()
        self.warned: set[str] = set()
        self._clear()

    def _clear(self) -> None:
        self.undo.close()
        self.watching, self.forwards, self.logits, self.sums, self.values = False, 0, None, [], {}

    def on_step_begin(self, args, state, control, **kwargs):
        self._clear()
        if state.global_step % self.every:
            return
        self.watching = True
        self.model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        # Below an adapter lies the model whose names a user knows.
        self.base = next((m for m in self.model.modules() if isinstance(m, PreTrainedModel)), self.model)
        self.logits = AttentionLogits(self.base) if self.attention else None
        if self.attention or self.outputs:
            self.undo.enter_context(replaced(self.trainer, "compute_loss", self._watch(self.trainer.compute_loss)))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.watching and self.gradients:
            # The Trainer has measured and clipped their norm, for which it took the loss scale of float16 off.
            for kind, named in self._by_kind().items():
                grads = [p.grad.detach() for p in named if p.grad is not None]
                if grads:
                    self.values[f"grad_rms/{kind}"] = _rms(grads)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.watching and self.gradients and not self.trainer.accelerator.optimizer_step_was_skipped:
            optimizer = plain_optimizer(self.trainer)
            groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
            for kind, named in self._by_kind().items():
                self._updates(kind, [(p, groups[id(p)], optimizer.state.get(p, {})) for p in named if id(p) in groups])

    def on_step_end(self, args, state, control, **kwargs):
        if not self.watching:
            return
        found = self.values
        if self.logits is not None:
            found |= self._attention_values()
        if self.sums:
            total, squares, count = self.trainer.accelerator.reduce(torch.stack(self.sums).sum(0), "sum").tolist()
            found["output_log_z"] = total / count if count else math.nan
            found["output_z_loss"] = self.z_coefficient * squares / count if count else math.nan
        self._clear()
        self._warn(found)
        if found:
            self.trainer.log(found)

    def on_train_end(self, args, state, control, **kwargs):
        self._clear()

    def _attention_values(self) -> dict[str, float]:
        # One entry for every module, so that all processes send vectors of one length.
        names = list(self.logits.all_names.values())
        vector = torch.full((len(names),), -torch.inf, dtype=torch.float64)
        for name, value in self.logits.largest.items():
            vector[names.index(name)] = value.double().cpu()
        vector = self.trainer.accelerator.gather(vector[None].to(self.trainer.args.device)).amax(0).tolist()
        seen = {name: value for name, value in zip(names, vector, strict=True) if value != -math.inf}
        if not seen and self.forwards:
            self._once(
                "none",
                f"ProxyDiagnostics saw no attention in {type(self.base).__name__}: it calls neither an attention "
                "function of transformers nor softmax in a module that is called attention.",
            )
        if not seen:
            return {}
        top = math.nan if any(map(math.isnan, seen.values())) else max(seen.values())
        return {"attention_logit_max": top} | {f"attention_logit_max/{name}": value for name, value in seen.items()}

    def _updates(self, kind: str, entries: Iterable[tuple[nn.Parameter, dict, dict]]) -> None:
        squares, count, eps = torch.zeros(2, dtype=torch.float64), 0, None
        for p, group, state in entries:
            if not {"exp_avg", "exp_avg_sq", "step"} <= set(state) or not {"betas", "eps"} <= set(group):
                continue
            if state["exp_avg_sq"].shape != p.shape or not state["exp_avg_sq"].is_floating_point():
                continue
            if state["step"] < 1:  # the first call of SOAP moves nothing
                continue
            pair = adam_update(
                state["exp_avg"], state["exp_avg_sq"], float(state["step"]), group["betas"], group["eps"]
            )
            squares += torch.stack([total_norm([x]).cpu() ** 2 for x in pair])
            count, eps = count + p.numel(), max(eps or 0.0, group["eps"])
        if count:
            with_eps, without = (squares / count).sqrt().tolist()
            self.values[f"update_rms/{kind}"] = with_eps
            self.values[f"update_kept/{kind}"] = with_eps / without if without else math.nan
            if self.values.get(f"grad_rms/{kind}", math.inf) < self.limits["eps_margin"] * eps:
                self._once(
                    f"eps of {kind}",
                    f"The gradient of {kind} parameters has RMS {self.values[f'grad_rms/{kind}']:.3g}, near eps = "
                    f"{eps:.3g}: updates shrink. Set a smaller adam_epsilon, such as {eps * 1e-4:.0e}.",
                )

    def _by_kind(self) -> dict[str, list[nn.Parameter]]:
        kinds, parameters = parameter_kinds(self.model), dict(self.model.named_parameters())
        trained = {name: kind for name, kind in kinds.items() if parameters[name].requires_grad}
        return {kind: [parameters[n] for n in trained if trained[n] == kind] for kind in sorted(set(trained.values()))}

    def _warn(self, found: Mapping[str, float]) -> None:
        top, limit = found.get("attention_logit_max", 0.0), self.limits["attention_limit"]
        if not top <= limit:
            worst = max((k for k in found if k.startswith("attention_logit_max/")), key=lambda k: found[k])
            self._once(
                "attention",
                f"The largest attention logit is {top:.3g}, above {limit:.3g} ({worst.partition('/')[2]}). Lower the "
                "learning rate, or use a model with normalised queries and keys (such as Qwen3 or OLMo 2).",
            )
        log_z, limit = found.get("output_log_z", 0.0), self.limits["log_z_limit"]
        if not abs(log_z) <= limit:
            self._once(
                "log_z",
                f"The mean log Z of the output logits is {log_z:.3g}, beyond {limit:.3g}: they drift from log "
                "probabilities. hfext.training.ZLossMixin holds them.",
            )

    def _once(self, what: str, message: str) -> None:
        if what not in self.warned:
            self.warned.add(what)
            logger.warning(message)

    def _watch(self, compute_loss):
        def watched(model, inputs, return_outputs=False, *args: Any, **kwargs: Any):
            two_pass = two_pass_optimizer(self.trainer)
            if not model.training or (two_pass is not None and two_pass.is_perturbed):
                return compute_loss(model, inputs, return_outputs, *args, **kwargs)
            # `compute_loss` may take labels out of the batch.
            given = {name: inputs.get(name) for name in ("labels", "shift_labels")}
            wanted, self.forwards = return_outputs or self.outputs, self.forwards + 1
            with self.logits.watch(inputs) if self.logits is not None else contextlib.nullcontext():
                result = compute_loss(model, inputs, wanted, *args, **kwargs)
            if self.outputs:
                self._measure(result[1], **given)
            return result[0] if wanted and not return_outputs else result

        return watched

    def _measure(self, outputs: Any, labels: Tensor | None, shift_labels: Tensor | None) -> None:
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{type(self.base).__name__} returned no tensor `logits` (a fused linear cross-entropy keeps them to "
                "itself), so log Z is not known. Pass outputs=False to measure the rest."
            )
        if shift_labels is not None:
            labels = shift_labels
        elif labels is not None and labels.dim() > 1 and loss_shifts_labels(self.trainer):
            labels = pad(labels[:, 1:], (0, 1), value=-100)
        if labels is None or labels.shape != logits.shape[:-1] or labels.is_floating_point():
            found = None if labels is None else tuple(labels.shape)
            raise ValueError(
                f"labels {found} are no classes of logits {tuple(logits.shape)}, so there is no log Z. Pass "
                "outputs=False to measure the rest."
            )
        self.sums.append(log_z_sums(logits.detach(), labels))


def _rms(tensors: list[Tensor]) -> float:
    return float(total_norm(tensors)) / math.sqrt(sum(x.numel() for x in tensors))


METHOD = Method(
    name="proxy_diagnostics",
    family="training",
    title="Small-scale proxies for large-scale Transformer training instabilities",
    authors="Wortsman et al.",
    arxiv="2309.14322",
    year=2023,
    status="variant",
    difference="A callback for any model. Gradients and updates are logged by kind of parameter, and the limits of "
    "the warnings on log Z and eps are ours.",
    target="hfext.training.proxy_diagnostics:ProxyDiagnostics",
    usage="trainer.add_callback(hfext.training.ProxyDiagnostics(trainer, every=100))",
    summary="Logs attention logits of every layer, log Z, and gradients against AdamW's eps, and warns.",
    claim="Normalised queries and keys lower the sensitivity of the final loss to the learning rate.",
    headline=Result(
        metric="range of learning rates with nearly the same final loss",
        setting="decoder-only models of 10M to 1.2B parameters on C4 (as recalled from the paper)",
        value="orders of magnitude with qk-layernorm and z-loss",
        baseline="large models diverge at high learning rates",
    ),
    recipe="training/proxy_diagnostics-lr-sensitivity.yaml",
    notes="`lr_sensitivity` and `extrapolated_logit` of the module are the paper's summary and forecast; the recipe "
    "sweeps learning rates for any `optim` of the Trainer, with its plot.",
)
