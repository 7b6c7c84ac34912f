"""One multilayer perceptron's training, by ``FusedMLP`` where that has the rule and by ``convert`` where it has not."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import fbkernels as fb
from fbkernels import rules
from fbkernels.lab.paper.driver import Data, Watch, short
from fbkernels.rules.joint import floored_power


class WithoutResidual(fb.Joint):
    """An ablation of Joint in direct feedback: B averages the correlation of noise and signal, from which no prediction is taken away.

    ``M = lr S / n_tot``, ``G = lr s r / (sigma^2 n_tot)`` with ``S = N I, s r = y~ - y`` or ``S = sum r r^T / |r|^2, s r = dL r / |r|^2``.
    ``|r|^2`` is Joint's.
    """

    predicts = False

    def update(self, m: fb.Measurement, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        scale = self.lr / max(m.units, m.batch)
        if self.signal == "output":
            G = m.output_change
            M = m.batch * torch.eye(G.shape[1], dtype=G.dtype, device=G.device)
        else:
            normed = m.regressor / floored_power(m)[:, None]
            G, M = m.loss_change[:, None] * normed, m.regressor.mT @ normed
        return scale * M, scale / m.std**2 * G


RULES: dict[str, Callable[..., fb.Rule]] = rules.RULES | {"without-residual": WithoutResidual}
FUSED = ("ridge", "lms", "joint", "fixed", "weight-transport")
ACTIVATIONS = {"identity": nn.Identity, "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
# the work of a step in forward passes, with layerwise feedback: clean and perturbed stream, gradients of activities and of weights
COST = {"ridge": 4, "lms": 4, "joint": 4, "without-residual": 4, "weight-mirror": 4, "node-perturbation": 3, "synthetic": 6}


def cost(job: Mapping[str, Any]) -> int:
    """Of a job's step, in forward passes; backprop's is 3."""
    return 1 if job["frozen"] else COST.get(job["rule"], 3)


@dataclass(frozen=True)
class MLP:
    """A network, how it is trained, and how often it is looked at; equal jobs give equal numbers.

    Losses are sums over the batch of 1/2 squared error (SPEC 8) or of cross-entropy; ``target`` "input" makes an autoencoder.
    ``activity_noise`` and ``input_noise`` are standard deviations of noise in the one forward pass of a step, through which the gradient
    passes: the paper's noise-only ablations and its denoising autoencoder. ``frozen``: hidden weights keep their first values.
    ``bias_units``: the authors' layout, in which a unit of activity 1 stands for the bias; it is perturbed, and B has a row for it.
    """

    method: str
    seed: int
    steps: int
    every: int  # steps between two records
    variant: str = ""  # what is varied, where a method has several jobs of a seed
    sizes: tuple[int, ...] = (784, 50, 20, 10)
    activations: tuple[str, ...] = ("sigmoid", "sigmoid", "identity")
    loss: str = "mse"
    target: str = "classes"
    rule: str = "ridge"
    rule_args: Mapping[str, Any] = field(default_factory=dict)
    feedback: str = "layerwise"
    noise_std: float = 0.01
    batch: int = 32
    optimizer: str = "sgd"
    lr: float = 4e-4
    warmup: int = 0
    perturb: Mapping[str, float] = field(default_factory=dict)  # every, fraction
    start: str = "normal"  # W and b from N(0, 2 / inputs), or "truncated": at two std, b = 0.1, B alike
    weight_seed: int | None = None  # where all seeds start from the same weights, as the authors' did
    activity_noise: float = 0.0
    input_noise: float = 0.0
    frozen: bool = False
    bias_units: bool = False
    pictures: bool = False  # keep reconstructions and the narrowest layer's activities of test images

    @property
    def name(self) -> str:
        return "-".join(f"{self.method} {self.variant} {self.seed}".replace(",", "").split())

    def run(self, data: Data, watch: Watch) -> dict[str, Any]:
        """Train, from the checkpoint if there is one; the records, and what pictures need."""
        x, y = data.x, data.x if self.target == "input" else data.y
        fused = self.rule in FUSED and not (self.activity_noise or self.input_noise or self.bias_units or self.perturb)
        net: Engine = Fused(self, x.device) if fused else Modules(self, x.device)
        records: list[dict[str, Any]] = []
        seconds, state = 0.0, watch.load()
        if state is not None:
            records, seconds = state["records"], state["seconds"]
            net.load_state_dict(state["net"])
        for step in range(len(records) * self.every, self.steps, self.every):
            begin = time.perf_counter()
            losses = net.fit(x, y, steps=min(self.every, self.steps - step), batch_size=self.batch)
            seconds += time.perf_counter() - begin
            records.append({"step": step + len(losses), "train_loss": short(float(losses.mean())), **self.score(net, data)})
            at = {"records": records, "seconds": seconds}
            watch(records[-1]["step"], lambda at=at: {**at, "net": net.state_dict()})  # type: ignore[misc]
        return {"records": records, "seconds": seconds} | (self.draw(net.model(), data) if self.pictures else {})

    @torch.no_grad()
    def score(self, net: Engine, data: Data) -> dict[str, Any]:
        """Test loss per batch of 32, test error in %, the same on noisy activities, as the authors scored some of theirs, the error on
        10,000 training images, and each hidden layer's feedback against backprop on the first 500 test images."""
        x, y = data.test_x, data.test_x if self.target == "input" else data.test_y
        model = net.model()
        record: dict[str, Any] = {}
        noise = self.activity_noise or (self.noise_std if self.rule in COST else 0.0)
        for kind, input_noise, std in (("", 0.0, 0.0), ("noisy_", self.input_noise, noise)):
            if kind and not (input_noise or std):
                continue
            loss, correct = self.test(model, x, y, input_noise, std)
            record[f"{kind}test_loss"] = short(32 * loss / len(x))
            if self.target == "classes":
                record[f"{kind}test_error"] = short(100 * (1 - correct / len(x)))
        if self.target == "classes":
            _, correct = self.test(model, data.x[:10_000], data.y[:10_000], 0.0, 0.0)
            record["train_error"] = short(100 * (1 - correct / len(data.y[:10_000])))
        if record["test_loss"] is None or (converted := net.converted()) is None:
            return record
        rows = fb.metrics.alignment(converted, self.criterion, x[:500], y[:500])
        keys = ("angle", "weight_angle", "sign_congruence", "relative_error", "projected_error")
        record["layers"] = [{key: short(row[key]) for key in keys} for row in rows.values()]
        if self.feedback == "layerwise":
            folded = [fb.metrics.authors_folded_angle(converted, self.criterion, x[i : i + 1], y[i : i + 1]) for i in range(8)]
            for layer, values in zip(record["layers"], zip(*(f.values() for f in folded), strict=True), strict=True):
                layer["authors_angle"] = short(sum(values) / len(values))
        return record

    def test(self, model: nn.Sequential, x: Tensor, y: Tensor, input_noise: float, std: float) -> tuple[float, int]:
        """Sum of the losses and number of right answers, with noise at the input and at what each further layer reads."""
        generator = torch.Generator(x.device).manual_seed(self.seed)

        def noisy(v: Tensor, std: float) -> Tensor:
            return v + std * torch.randn(v.shape, generator=generator, device=v.device) if std else v

        loss, correct = 0.0, 0
        for part, target in zip(x.split(2000), y.split(2000), strict=True):
            v = noisy(part, input_noise)
            for i, layer in enumerate(model):
                v = layer(noisy(v, std) if i and isinstance(layer, nn.Linear) else v)
            loss += float(self.criterion(v, target).double())
            correct += int((v.argmax(1) == target).sum()) if self.target == "classes" else 0
        return loss, correct

    def draw(self, model: nn.Sequential, data: Data) -> dict[str, Any]:
        """The narrowest layer's activities of 1,000 test images with their classes, and eight images with what comes out for them."""
        narrow = 2 * self.sizes.index(min(self.sizes)) - 1
        with torch.no_grad():
            latent, outputs = model[: narrow + 1](data.test_x[:1000]), model(data.test_x[:8])
        pixels = [(255 * images.clamp(0, 1)).byte().tolist() for images in (data.test_x[:8], outputs)]
        points = [[short(v) for v in row] for row in latent.tolist()]
        return {"latent": points, "classes": data.test_y[:1000].tolist(), "inputs": pixels[0], "outputs": pixels[1]}

    @cached_property
    def criterion(self) -> nn.Module:
        return HalfSquaredError() if self.loss == "mse" else nn.CrossEntropyLoss(reduction="sum")

    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """W and b of each layer before training."""
        generator = torch.Generator().manual_seed(self.seed if self.weight_seed is None else self.weight_seed)

        def draw(std: float, *shape: int) -> Tensor:
            if self.start == "normal":
                return std * torch.randn(shape, generator=generator)
            return nn.init.trunc_normal_(torch.empty(shape), std=std, a=-2 * std, b=2 * std, generator=generator)

        stds = [(2 / n) ** 0.5 for n in self.sizes[:-1]]
        weights = [draw(std, n, m) for std, m, n in zip(stds, self.sizes[:-1], self.sizes[1:], strict=True)]
        biases = [draw(s, n) if self.start == "normal" else torch.full((n,), 0.1) for s, n in zip(stds, self.sizes[1:], strict=True)]
        return weights, biases


class Engine(Protocol):
    """What trains the network of a job."""

    def fit(self, x: Tensor, y: Tensor, *, steps: int, batch_size: int) -> Tensor: ...
    def model(self) -> nn.Sequential: ...
    def converted(self) -> nn.Module | None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Fused:
    """The whole step in compiled code."""

    def __init__(self, job: MLP, device: torch.device) -> None:
        self.net = fb.FusedMLP(
            job.sizes,
            activations=job.activations,
            loss=job.loss,
            feedback=job.feedback,
            rule=RULES[job.rule](**job.rule_args),
            noise_std=job.noise_std,
            optimizer=job.optimizer,
            lr=job.lr,
            warmup=job.warmup,
            seed=job.seed,
            device=device,
        )
        for own, new in zip((*self.net.weights, *self.net.biases), (p for group in job.parameters() for p in group), strict=True):
            own.copy_(new)
        for B in self.net.B if job.rule in ("lms", "fixed") else ():
            if job.start == "truncated":
                std = (2 / (len(B) + 1)) ** 0.5
                nn.init.trunc_normal_(B, std=std, a=-2 * std, b=2 * std, generator=torch.Generator(B.device).manual_seed(job.seed + 1))
            if job.frozen:
                B.zero_()  # no error reaches a hidden layer
        self.fit, self.model, self.exact = self.net.fit, self.net.to_module, job.rule == "weight-transport" or job.frozen
        self.state_dict, self.load_state_dict = self.net.state_dict, self.net.load_state_dict

    def converted(self) -> nn.Module | None:
        return None if self.exact else self.net.to_converted()


class Modules:
    """The same steps in torch modules: the same start, batches and noise."""

    def __init__(self, job: MLP, device: torch.device) -> None:
        self.job, layers = job, list[nn.Module]()
        weights, biases = job.parameters()
        for i, (W, b, name) in enumerate(zip(weights, biases, job.activations, strict=True)):
            if i and job.bias_units:
                layers.append(BiasUnit())
            if i and job.activity_noise:
                layers.append(Noise(job.activity_noise))
            W = torch.cat((W, b[:, None]), 1) if i and job.bias_units else W
            linear = nn.Linear(W.shape[1], len(W), bias=not (i and job.bias_units))
            linear.weight.data.copy_(W)
            if linear.bias is not None:
                linear.bias.data.copy_(b)
            layers += [linear, ACTIVATIONS[name]()]
        self.net: nn.Module = nn.Sequential(*layers).to(device)
        self.loss: nn.Module = job.criterion
        self.plain = job.rule == "weight-transport"
        if not self.plain:
            options: dict[str, Any] = {"noise_std": job.noise_std, "seed": job.seed, "warmup": job.warmup, **job.perturb}
            self.net = fb.convert(self.net, feedback=job.feedback, rule=RULES[job.rule](**job.rule_args), **options)
            self.loss = fb.PerturbedLoss(job.criterion, self.net)
        decay = float(job.rule_args.get("decay", 0)) / job.lr  # W decays as B does
        kinds = {"sgd": torch.optim.SGD, "adam": TF1Adam}
        self.optimizer = kinds[job.optimizer](self.net.parameters(), lr=job.lr, weight_decay=decay)
        self.step, self.epoch, self.order = 0, -1, torch.empty(0)

    def fit(self, x: Tensor, y: Tensor, *, steps: int, batch_size: int) -> Tensor:
        losses = []
        for step in range(self.step, self.step + steps):
            rows = self.rows(step * batch_size, batch_size, len(x)).to(x.device)
            inputs, targets = x[rows], y[rows]
            if self.job.input_noise or self.job.activity_noise:
                torch.manual_seed((self.job.seed << 32) + step)
            if self.job.input_noise:
                inputs = inputs + self.job.input_noise * torch.randn_like(inputs)
            loss = self.loss(self.net(inputs), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        self.step += steps
        return torch.stack(losses)

    def rows(self, first: int, count: int, samples: int) -> Tensor:
        """FusedMLP's order."""
        epoch, offset = divmod(first, samples)
        if epoch != self.epoch:
            words = fb.functional.philox_words(self.job.seed, epoch, 2**32 - 1, samples, 1)
            self.epoch, self.order = epoch, words.flatten().argsort(stable=True)
        rows = self.order[offset : offset + count]
        return rows if len(rows) == count else torch.cat((rows, self.rows(first + len(rows), count - len(rows), samples)))

    def model(self) -> nn.Sequential:
        model = self.net if self.plain else fb.revert(self.net)
        return nn.Sequential(*(layer for layer in model.children() if not isinstance(layer, Noise)))

    def converted(self) -> nn.Module | None:
        return None if self.plain else self.net

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])


class HalfSquaredError(nn.Module):
    """``1/2 sum_j (y_j - t_j)^2``, summed over the batch; targets that are classes count as one-hot."""

    def __init__(self) -> None:
        super().__init__()
        self.reduction = "sum"

    def forward(self, y: Tensor, target: Tensor) -> Tensor:
        target = target if target.is_floating_point() else nn.functional.one_hot(target, y.shape[-1])
        losses = 0.5 * (y - target.to(y.dtype)).square().sum(1)
        return losses.sum() if self.reduction == "sum" else losses


class BiasUnit(nn.Module):
    """Appends a unit of activity 1."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x.new_ones(len(x), 1)), 1)


class Noise(nn.Module):
    """Adds Gaussian noise in training."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        return x + self.std * torch.randn_like(x) if self.training else x


class TF1Adam(torch.optim.Adam):
    """TensorFlow 1's Adam, whose eps is added before the bias correction: torch's with ``eps / sqrt(1 - beta2^t)`` (PAPER 6.23)."""

    def __init__(self, params: Any, lr: float, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay)
        self.tf_eps, self.t = eps, 0

    def step(self, closure: Any = None) -> Any:
        self.t += 1
        for group in self.param_groups:
            group["eps"] = self.tf_eps / (1 - group["betas"][1] ** self.t) ** 0.5
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "t": self.t}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self.t = state.pop("t")
        super().load_state_dict(state)
