"""What the ranks of the tests run, each function on every rank."""

from collections.abc import Sequence

import torch


def coarse(images, prompts=None):
    """A reward that the fp32 rounding of an image does not move, where standardising a smooth one magnifies it."""
    return (images.mean((1, 2, 3)) * 200).round()


def run(words: Sequence[str]) -> int:
    """A whole run by its command line; returns the exit code."""
    from hrf_fast.train import main

    return main(words)


def four_groups(words: Sequence[str]):
    """The configuration, parts, batch, windows (0, 4, 2 and 3 to 5) advantages and optimizer steps of an iteration.

    Every engine sees the same data to the bit: the rollouts are made before it lays out the weights anew, by weights
    that are aligned as it will align them (`load_policy` says why; a step of std 0.01 magnifies the rounding of
    unaligned ones to 2e-5 of the gradient).
    """
    from hrf_fast.build import build_engine, build_policy
    from hrf_fast.config.load import load_config
    from hrf_fast.noise import NoiseKey, noise_key
    from hrf_fast.policies.sample import starting_noise
    from hrf_fast.training.components import Parts
    from hrf_fast.training.rollout import Start, rollout
    from hrf_fast.training.update import Batch, own_groups, replays
    from hrf_fast.windows.base import Window

    config = load_config(words)
    policy = build_policy(config)
    if config.compute.activations == "checkpoint":
        policy.checkpoint_activations()
    windows = [Window(start, 5) for start in (0, 4, 2, 3)]
    size = config.train.group_size
    trajectories = {}
    for group in own_groups(config):
        place = NoiseKey(noise_key(0, 0, "rollout"), torch.arange(group * size, (group + 1) * size))
        start = starting_noise(policy, place)
        micro_batch_size = config.compute.micro_batch_size or size
        beginning = {group: Start(windows[group], start, place)}
        trajectories |= rollout(policy, beginning, micro_batch_size=micro_batch_size)[0]
    engine = build_engine(policy, config)
    calls = replays(config, {group: windows[group] for group in trajectories})
    for call in calls if config.compute.activations == "keep" else []:
        # as the rollout keeps them, on latents that are equal for every engine
        assert len(call.pieces) == 1
        (piece,), step = call.pieces, call.steps.start
        latents = trajectories[piece.group].latents[step - windows[piece.group].start, piece.samples]
        call.output = policy.model_output(latents, policy.timestep_list[step])
    generator = torch.Generator().manual_seed(3)
    advantages = {group: torch.randn(size, generator=generator) for group in range(len(windows))}
    return (
        config,
        Parts(policy, None, None, engine, None, config),
        Batch(trajectories, calls),
        windows,
        advantages,
        [0],
    )


def gradient(words: Sequence[str]) -> tuple[torch.Tensor, float]:
    """The gradient of one optimizer step on all four groups, and its norm."""
    from hrf_fast.training.update import learn

    config, parts, *groups = four_groups(words)
    # low enough not to overflow
    parts.engine.loss_scale.value = 1024.0 if config.compute.precision == "fp16" else 1.0
    steps, _ = learn(parts, config, *groups, iteration=0, note=print)
    tensors, _ = parts.engine.optimizer_state()
    count = sum(name.endswith("exp_avg") for name in tensors)
    # AdamW's first average is (1 - beta1) times the gradient
    flat = [tensors[f"{index}.exp_avg"].flatten() / 0.1 for index in range(count)]
    return (torch.cat(flat) if flat else torch.empty(0)), float(steps[0].grad_norm)


def not_finite(words: Sequence[str]) -> list:
    """A NaN in the last group, of the second rank: what stays, and whether the next step is made."""
    from hrf_fast.training.update import learn

    config, parts, batch, windows, advantages, steps = four_groups([*words, "stop.on_nan=skip"])
    notes = []

    def weights():
        with parts.engine.gathered():
            return torch.cat([p.detach().flatten().clone() for p in parts.policy.unet.parameters()])

    parts.engine.set_learning_rate(0.01)
    before = weights()
    broken = advantages | {3: advantages[3] * torch.nan}
    where = {"iteration": 7, "note": notes.append}
    made, skipped = learn(parts, config, batch, windows, broken, steps, **where)
    kept = bool(torch.equal(weights(), before))
    again, _ = learn(parts, config, batch, windows, advantages, steps, **where)
    after = weights()
    finite = bool(after.isfinite().all()) and not torch.equal(after, before)
    config.stop.on_nan = "stop"
    try:
        learn(parts, config, batch, windows, broken, steps, **where)
        error = ""
    except FloatingPointError as found:
        error = str(found)
    return [len(made), skipped, kept, len(again), finite, notes, error]


def collectives() -> list:
    """gather, gather_rows, broadcast, average, main_says and what agreed raises."""
    from hrf_fast.distributed import comm

    rank = comm.rank()
    tensors = [torch.full((2,), float(rank)), torch.tensor([[10.0 * rank]])]
    comm.average(tensors)
    seen = [comm.gather(rank), comm.gather_rows(torch.tensor([rank])).tolist(), comm.broadcast(f"from {rank}")]
    seen += [[tensor.tolist() for tensor in tensors], comm.main_says(lambda: rank)]
    named = {"a": torch.tensor([5.0])} if rank == 0 else {}
    seen.append([(name, value.item()) for name, value in comm.broadcast_tensors(named)])
    try:
        with comm.agreed():
            if rank == 1:
                raise ValueError("only here")
    except ValueError as error:
        seen.append(str(error))
    try:
        comm.main_says(lambda: [][0])
    except IndexError as error:
        seen.append(str(error))
    return seen
