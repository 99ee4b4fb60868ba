"""What `pilotlight bench --rates` measures and `pilotlight plan` reads: an artifact's speed on one machine."""

from __future__ import annotations

from pathlib import Path

import msgspec

from pilotlight.errors import ConfigError


class StepTime(msgspec.Struct, frozen=True):
    """A decode run of so many rows, each with so many tokens before it."""

    graph: str
    rows: int
    context_tokens: int
    ms: float


class ChunkTime(msgspec.Struct, frozen=True):
    """A prefill run of so many tokens behind so many others."""

    tokens: int
    past_tokens: int
    ms: float


class StepRates(msgspec.Struct, frozen=True):
    """A session's runs, and what the engine takes around them for each step and for each row of it.

    Each kind of run was measured again and again. A decode run behind a prompt's takes ``after_prefill_factor`` times
    as long: it finds the processor's caches full of what the prompt left there.
    """

    num_threads: int
    decode: list[StepTime]
    prefill: list[ChunkTime]
    step_overhead_ms: float = 0.0
    row_overhead_ms: float = 0.0
    after_prefill_factor: float = 1.0


class StartRates(msgspec.Struct, frozen=True):
    """From the wish for a replica to the one that is ready: out of deep sleep, and out of light sleep.

    ``template_ms`` is the making of a template. The first prompt of a new replica takes ``deep_first_run_ms`` or
    ``light_first_run_ms`` longer than it would later, and ``first_token_ms`` for each of its tokens, whose place in the
    cache nobody has touched before; then the whole session is there after ``grow_ms``, and until then the lean one's
    steps take ``growing_factor`` times as long, beside the making of the other.
    """

    deep_ms: float
    light_ms: float
    template_ms: float
    deep_first_run_ms: float = 0.0
    light_first_run_ms: float = 0.0
    first_token_ms: float = 0.0
    grow_ms: float = 0.0
    growing_factor: float = 1.0


class HostRates(msgspec.Struct, frozen=True):
    """What the host adds to a request: from the client's first byte to the replica, and from there to the client.

    ``request_ms + prompt_tokens · prompt_token_ms`` of waiting in all. The event loop is busy for ``request_busy_ms``
    with each request, and for ``token_busy_ms`` with each token that streams.

    A replica that serves is slower than its session alone: it works now and then, so that the processor is seldom at
    its fastest, others use it and its caches in between, and what a step gives is sent to the host. A decode step
    takes ``step_ms`` and ``row_ms`` for each row more, or less. A prompt takes ``prefill_factor`` times as long, and
    ``idle_prefill_factor`` times where the replica was idle before it: then the processor's clock, its caches and its
    scheduler have to wake up, too. While the event loop works, the replica takes ``crowded_factor`` times as long:
    cores share their caches, their memory, and often their units.
    """

    request_ms: float = 0.0
    prompt_token_ms: float = 0.0
    request_busy_ms: float = 0.0
    token_busy_ms: float = 0.0
    prefill_factor: float = 1.0
    idle_prefill_factor: float = 1.0
    step_ms: float = 0.0
    row_ms: float = 0.0
    crowded_factor: float = 1.0


class ArtifactSize(msgspec.Struct, frozen=True):
    """What a plan has to know of an artifact. ``replica_bytes`` is a replica's own memory beside its KV cache."""

    name: str
    digest: str
    max_context_tokens: int
    weights_bytes: int
    kv_bytes_per_token: int
    replica_bytes: int | None = None


class Rates(msgspec.Struct, frozen=True):
    """All of a rates file. Keys that are not here are for people.

    ``stolen_share``: what part of the cores' time the machine did not get meanwhile, because its hardware worked for
    other guests.
    """

    artifact: ArtifactSize
    lean: StepRates
    whole: StepRates
    starts: StartRates
    host: HostRates = HostRates()
    stolen_share: float = 0.0


def read_rates(path: Path) -> Rates:
    """Return the rates in a file.

    Raises:
        ConfigError: the file is missing, or is not what ``pilotlight bench --rates`` prints.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Rates)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: is not what `pilotlight bench ARTIFACT --rates` prints ({error})") from error
