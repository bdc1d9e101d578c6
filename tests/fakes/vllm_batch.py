"""Scheduler and model runner of the stand-in for vLLM, where a class of its user proposes tokens.

They follow vLLM 0.25.1: all requests step together, long prompts are read in parts, what does not fit into a
step is cut off or waits with its proposal, draws accept proposals by rejection sampling, and what has ended
leaves the runner in the next step.
"""

from __future__ import annotations

import asyncio
import importlib
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.fakes.reference_model import draw

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

# A token, and the log-probabilities that it was chosen from.
Written = tuple[int, Any]


class Tensor:
    """As much of torch.Tensor as a proposer needs."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, wanted: Any) -> Tensor:
        return Tensor(self.values[wanted])

    def __gt__(self, other: Tensor) -> Tensor:
        return Tensor(self.values > other.values)

    def __sub__(self, other: Tensor) -> Tensor:
        return Tensor(self.values - other.values)

    def float(self) -> Tensor:
        return Tensor(self.values.astype(np.float32))

    def unsqueeze(self, dim: int) -> Tensor:
        return Tensor(np.expand_dims(self.values, dim))

    def sum(self, dim: int) -> Tensor:
        return Tensor(self.values.sum(dim))

    def logsumexp(self, dim: int) -> Tensor:
        return Tensor(np.log(np.exp(self.values).sum(dim)))

    def tolist(self) -> list[Any]:
        found: list[Any] = self.values.tolist()
        return found


@dataclass(eq=False)
class Request:
    """A request. computed: tokens whose keys are cached. proposal: to verify in its next step."""

    name: str
    prompt: list[int]
    params: Any
    adapter: int
    computed: int
    tokens: list[int] = field(default_factory=list)
    proposal: list[int] = field(default_factory=list)
    steps: asyncio.Queue[list[Written] | Exception] = field(default_factory=asyncio.Queue)
    processors: list[Any] | None = None

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.params.seed)

    def sample(self, rows: Any, processors: list[Any]) -> list[int]:
        """Return what a step writes. rows: log-probabilities of the proposal's tokens and the one after.

        processors: of logits. Those of the proposal's tokens are not shown to them.
        """
        if self.processors is None:
            self.processors = own_processors(processors, self.params)
        params = self.params
        written: list[int] = []
        for token, row in zip(self.proposal, rows, strict=False):
            if params.temperature == 0:
                written.append(int(row.argmax()))
            else:
                written.append(_accept_or_draw(token, row, params, self.rng))
            if written[-1] != token:
                return written
        row = processed(rows[-1], self.processors, self.tokens)
        return [*written, draw(row, params.temperature, params.top_p, self.rng)]


class RejectionSampler:
    """Has the method in which vLLM looks at a step's logits."""

    def _get_logprobs_tensors(self, *_: Any) -> None:
        """Do nothing."""


class Batch:
    """Steps all requests of an engine. finish: returns why an answer ends, if it does."""

    def __init__(self, args: Any, model: Any, context: int, finish: Callable[..., str | None]) -> None:
        self.running: list[Request] = []
        self.worker = _worker(args, context)
        self._model = model
        self._context = context
        self._finish = finish
        self._budget = getattr(args, "max_num_batched_tokens", None) or 2048
        self._most = args.speculative_config["num_speculative_tokens"]
        self._stepping: asyncio.Task[None] | None = None

    async def steps(self, request: Request) -> AsyncGenerator[list[Written], None]:
        """Yield what each step writes of a request, to its end."""
        self.running.append(request)
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step_on())
        try:
            while True:
                written = await request.steps.get()
                if isinstance(written, Exception):
                    raise written
                yield written
        finally:
            with suppress(ValueError):
                self.running.remove(request)

    async def _step_on(self) -> None:
        while self.running:
            await asyncio.sleep(0)
            try:
                self.step()
            except Exception as error:
                for request in self.running:
                    request.steps.put_nowait(error)
                self.running.clear()
                raise

    def step(self) -> None:
        """Step every request that the token budget holds."""
        runner = self.worker.model_runner
        for gone in runner.requests.keys() - {request.name for request in self.running}:
            del runner.requests[gone]
        stepped = self._schedule()
        rows = [self._compute(request) for request in stepped]
        proposals = [request.proposal for request in stepped]
        runner.input_batch.req_ids = [request.name for request in stepped]
        runner.input_batch.spec_token_ids = proposals
        self._show(proposals, rows)
        is_reading = [request.computed < _known(request) for request in stepped]
        written = [
            [] if reads else request.sample(own, runner.input_batch.logitsprocs.non_argmax_invariant)
            for request, own, reads in zip(stepped, rows, is_reading, strict=True)
        ]
        longest = max((request.computed for request in stepped), default=0)
        for request, tokens in zip(stepped, written, strict=True):
            runner.requests[request.name].output_token_ids += tokens
        if longest + self._most <= runner.effective_drafter_max_model_len:
            proposed = runner.drafter.propose(written, None, None, slot_mappings=None)
        else:
            proposed = [[0] * self._most for _ in stepped]
        for request, own, tokens, following in zip(stepped, rows, written, proposed, strict=True):
            assert len(following) <= self._most
            if tokens:
                # The keys of tokens that were not accepted are given up.
                request.computed = _known(request) + len(tokens) - 1
                request.proposal = list(following)
                self._deliver(request, list(zip(tokens, own, strict=False)))

    def _schedule(self) -> list[Request]:
        budget, stepped = self._budget, []
        for request in self.running:
            wanted = _known(request) + len(request.proposal) - request.computed
            count = min(wanted, budget, self._context - 1 - request.computed)
            if count > 0:
                budget -= count
                request.computed += count
                request.proposal = request.proposal[: max(request.computed - _known(request), 0)]
                self.worker.model_runner.requests.setdefault(
                    request.name, SimpleNamespace(sampling_params=request.params, output_token_ids=[])
                )
                stepped.append(request)
        return stepped

    def _compute(self, request: Request) -> Any:
        """Return the rows that a step samples from."""
        known = [*request.prompt, *request.tokens, *request.proposal][: request.computed]
        return self._model.sequence(request.adapter).append(known)[-1 - len(request.proposal) :]

    def _show(self, proposals: list[list[int]], rows: list[Any]) -> None:
        """Call what vLLM calls with a step's logits."""
        runner = self.worker.model_runner
        last = Tensor([own[-1] for own in rows])
        if not any(proposals):
            runner.sampler.forward(last, None)
            return
        runner.sampler.forward(last, None, predict_bonus_token=True)
        metadata = SimpleNamespace(num_draft_tokens=[len(proposal) for proposal in proposals])
        runner.rejection_sampler._get_logprobs_tensors(  # noqa: SLF001 - vLLM calls it
            20, metadata, None, Tensor(np.concatenate([own[:-1] for own in rows])), last, None
        )

    def _deliver(self, request: Request, written: list[Written]) -> None:
        for end, (token, _) in enumerate(written, start=1):
            request.tokens.append(token)
            if self._finish(request.prompt, request.tokens, request.params):
                self.running.remove(request)
                written = written[:end]
                break
        request.steps.put_nowait(written)


def own_processors(processors: list[Any], params: Any) -> list[Any]:
    """Return what each processor keeps for a request, where it has something for it."""
    made = [each.new_req_logits_processor(params) for each in processors]
    return [each for each in made if each is not None]


def processed(row: Any, processors: list[Any], written: list[int]) -> Any:
    """Return a row of logits after a request's processors. vLLM hands them a copy."""
    for each in processors:
        row = each(written, row.copy())
    return row


def _known(request: Request) -> int:
    return len(request.prompt) + len(request.tokens)


def _accept_or_draw(token: int, row: Any, params: Any, rng: np.random.Generator) -> int:
    """Return a proposed token with its probability, else a draw of the others: Leviathan et al. 2023."""
    order = np.argsort(-row)
    mass = np.cumsum(np.exp(row[order]))
    probs = np.exp((row - row.max()).astype(np.float64) / params.temperature)
    if params.top_p < 1:
        probs[order[int(np.searchsorted(mass, params.top_p)) + 1 :]] = 0.0
    probs /= probs.sum()
    if rng.random() < probs[token]:
        return token
    probs[token] = 0.0
    return int(rng.choice(len(probs), p=probs / probs.sum()))


def _worker(args: Any, context: int) -> Any:
    """Return a worker with a proposer and the extension, as the arguments name them."""
    config = args.speculative_config
    assert config["method"] == "custom_class"
    assert args.async_scheduling is False, "a custom class proposes between steps"
    proposer, extension = [_class(name) for name in (config["model"], args.worker_extension_cls)]
    worker = type("Worker", (extension,), {})()
    worker.rank = 0
    graphs = 0 if args.enforce_eager else getattr(args, "max_cudagraph_capture_size", None)
    worker.model_runner = SimpleNamespace(
        drafter=proposer(
            SimpleNamespace(
                speculative_config=SimpleNamespace(num_speculative_tokens=config["num_speculative_tokens"]),
                compilation_config=SimpleNamespace(max_cudagraph_capture_size=graphs),
                scheduler_config=SimpleNamespace(
                    max_num_scheduled_tokens=None,
                    max_num_batched_tokens=getattr(args, "max_num_batched_tokens", None) or 2048,
                ),
            )
        ),
        requests={},
        input_batch=SimpleNamespace(
            req_ids=[], spec_token_ids=[], logitsprocs=SimpleNamespace(non_argmax_invariant=[])
        ),
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(model=args.model)),
        device="cpu",
        rejection_sampler=RejectionSampler(),
        sampler=SimpleNamespace(forward=lambda *_, **__: None),
        max_model_len=context,
        effective_drafter_max_model_len=context,
    )
    return worker


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
