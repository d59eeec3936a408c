"""Prompt encoders: the pipelines' own embeddings, each text once, and cut where it is too long."""

import re

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from hrf_fast.policies import encoders
from hrf_fast.policies.encoders import resident
from hrf_fast.policies.families.sd3 import STABLE_DIFFUSION_3
from hrf_fast.prompts import Prompt
from tests.flow_models import load_flow_policy
from tests.text_models import KINDS, LENGTH, SIDE, load_text_policy, text_model

TEXTS = ["a red cat", "dog", "a red cat"]
NEGATIVES = ["red", "", "dog, cat"]


def prompts():
    return [Prompt(*texts) for texts in zip(TEXTS, NEGATIVES, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_the_pipeline_encodes(kind):
    policy, pipeline = load_text_policy(kind), DiffusionPipeline.from_pretrained(text_model(kind))
    condition = policy.condition(prompts())
    for row, (text, negative) in enumerate(zip(TEXTS, NEGATIVES, strict=True)):
        # the pipeline is called without a negative prompt where there is none
        options = {"negative_prompt": negative or None, "num_images_per_prompt": 1, "device": torch.device("cpu")}
        with torch.no_grad():
            positive, unconditional, *pooled = pipeline.encode_prompt(text, do_classifier_free_guidance=True, **options)
        for branch, theirs in ((condition.conditional, positive), (condition.unconditional, unconditional)):
            torch.testing.assert_close(branch["encoder_hidden_states"][row : row + 1], theirs, rtol=0, atol=1e-6)
        for branch, theirs in zip((condition.conditional, condition.unconditional), pooled, strict=bool(pooled)):
            torch.testing.assert_close(branch["text_embeds"][row : row + 1], theirs, rtol=0, atol=1e-6)
    for rows in (condition.conditional, condition.unconditional):
        assert all(len(tensor) == len(TEXTS) and not tensor.requires_grad for tensor in rows.values())
    if kind == "sdxl":
        assert condition.conditional["time_ids"].tolist() == [[2 * SIDE, 2 * SIDE, 0, 0, 2 * SIDE, 2 * SIDE]] * 3
        # force_zeros_for_empty_prompt
        assert float(condition.unconditional["encoder_hidden_states"][1].abs().max()) == 0
        assert float(condition.unconditional["text_embeds"][1].abs().max()) == 0


def test_without_zeros_an_empty_negative_prompt_of_sdxl_is_encoded():
    policy = load_text_policy("sdxl")
    policy._encoder._index = {"force_zeros_for_empty_prompt": False}
    rows = policy.condition([Prompt("dog")])
    for name, tensor in policy.condition([Prompt("")]).conditional.items():
        assert torch.equal(rows.unconditional[name], tensor)


@pytest.mark.parametrize(("scale", "guided", "branches"), [(5.0, True, 2), (5.0, False, 1), (1.0, True, 1)])
def test_the_unconditional_branch_is_there_under_guidance_alone(scale, guided, branches):
    condition = load_text_policy("sd1", guidance_scale=scale).condition(prompts(), guided=guided)
    assert condition.branches == branches and len(condition.inputs["encoder_hidden_states"]) == branches * 3


def test_encoders_in_half_precision_say_nearly_the_same_and_the_rest_is_as_it_was():
    policy, half = load_text_policy("sdxl"), load_text_policy("sdxl", encoder_precision="bf16")
    assert {weight.dtype for weight in half._encoder.encoders.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in [*half.decoder.parameters(), *half.unet.parameters()]} == {torch.float32}
    ours, theirs = (each.condition(prompts()).conditional for each in (half, policy))
    for name, rows in ours.items():
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, theirs[name], rtol=0.05, atol=0.05)
    assert not torch.equal(ours["text_embeds"], theirs["text_embeds"])


def test_no_prompt_is_the_empty_one():
    policy = load_text_policy("sd1")
    ours, theirs = policy.condition([None]).inputs, policy.condition([Prompt("")]).inputs
    assert torch.equal(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])


def test_a_text_is_encoded_once_and_alike_in_any_company(monkeypatch):
    policy = load_text_policy("sdxl")
    calls = [[], []]
    for encoder, seen in zip(policy._encoder.encoders, calls, strict=True):
        encoder.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(len(inputs[0])))
    together = policy.condition(prompts()).conditional
    # "a red cat", "dog", "red", "" and "dog, cat", one at a time
    assert calls == [[1] * 5] * 2
    alone = policy.condition([Prompt("dog")]).conditional
    assert calls == [[1] * 5] * 2
    assert all(torch.equal(alone[name][0], together[name][1]) for name in alone)
    # what was not used for longest is forgotten
    size = sum(tensor.nbytes for tensor in policy._encoder._remembered["dog"].values())
    monkeypatch.setattr(encoders, "_REMEMBERED", 2 * size)
    policy.condition([Prompt("dog", "")])
    assert [*policy._encoder._remembered] == ["dog", ""]
    policy.condition([Prompt("a", "")])
    assert [*policy._encoder._remembered] == ["a", ""] and calls == [[1] * 6] * 2


def test_a_prompt_over_the_limit_is_cut_and_said_once_with_the_prompt(recwarn):
    policy = load_text_policy("sdxl")
    # start and end are tokens too
    fitting, long = " ".join(["dog"] * (LENGTH - 2)), " ".join(["dog"] * (LENGTH - 2) + ["red", "cat"])
    policy.condition([Prompt(fitting)])
    assert not [warning for warning in recwarn if "cut" in str(warning.message)]
    rows = policy.condition([Prompt(long), Prompt(fitting)]).conditional["encoder_hidden_states"]
    assert torch.equal(rows[0], rows[1])
    policy._encoder._remembered.clear()
    policy.condition([Prompt(long)])
    (warning,) = [warning for warning in recwarn if "cut" in str(warning.message)]
    assert repr(long) in str(warning.message) and "'red cat'" in str(warning.message)


def test_a_prompt_that_t5_cuts_too_is_said_for_each_length(recwarn):
    policy = load_flow_policy("sd3")
    long = " ".join(["dog"] * (STABLE_DIFFUSION_3.t5_length + 8))
    for _ in range(2):
        policy.condition([Prompt(long)])
        policy._encoder._remembered.clear()
    texts = [str(warning.message) for warning in recwarn if "is cut off" in str(warning.message)]
    # both CLIPs once
    assert [re.findall(r"takes (\d+)", text) for text in texts] == [[str(LENGTH)], [str(STABLE_DIFFUSION_3.t5_length)]]


def test_offloaded_modules_are_on_the_device_inside_the_block_alone(monkeypatch):
    moves = []

    class Watched(nn.Linear):
        def to(self, device):
            moves.append(str(device))
            if str(device) == "cuda":
                self.weight.data = self.weight.data.clone()

    kept = Watched(2, 3)
    memory = kept.weight.data_ptr()
    with resident(kept, torch.device("cuda"), True):
        assert kept.weight.data_ptr() != memory
    # weights that nothing changes are not copied back
    assert kept.weight.data_ptr() == memory
    moves.clear()

    def watched():
        return Watched(2, 3)

    with resident(watched(), torch.device("cuda"), True):
        assert moves == ["cuda"]
    assert moves == ["cuda", "cpu"]
    with pytest.raises(RuntimeError), resident(watched(), torch.device("cuda"), True):
        raise RuntimeError
    assert moves == ["cuda", "cpu"] * 2
    with resident(watched(), torch.device("cuda"), False):
        assert moves == ["cuda", "cpu"] * 2


def test_encoders_and_decoder_are_moved_for_their_work_alone(monkeypatch):
    policy, plain = load_text_policy("sd1"), load_text_policy("sd1")
    policy._encoder._offload = policy.offload = True
    moves = []
    for module in (*policy._encoder.encoders, policy.decoder):
        monkeypatch.setattr(
            module, "to", lambda device, module=module: moves.append((type(module).__name__, str(device)))
        )
    ours, theirs = (each.condition([Prompt("dog"), Prompt("cat")]) for each in (policy, plain))
    # there and back once, for both texts and the negative one; no more once they are known
    policy.condition([Prompt("cat")])
    assert moves == [("CLIPTextModel", "cpu")] * 2
    latents = torch.randn(2, *policy.latent_shape)
    assert torch.equal(policy.decode(latents), plain.decode(latents))
    assert moves[2:] == [("AutoencoderKL", "cpu")] * 2
    assert torch.equal(ours.inputs["encoder_hidden_states"], theirs.inputs["encoder_hidden_states"])
