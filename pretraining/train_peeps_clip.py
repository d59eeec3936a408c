"""Train the CLIP of `peeps` and its card's figure: `python pretraining/train_peeps_clip.py --data DATA --out CLIP`.

A CLIPModel of transformers with the tokenizer of the pipeline: an image tower that sees 64 patches of 8 x 8 pixels, and
a text tower that starts from what `train_peeps_text.py` learnt. It is trained by the contrastive loss on the drawings
and their captions. The attributes are read off the image embedding besides, because people in a batch differ in so much
that a contrast alone is slow to find the mouth. With this model a CLIP score needs no download.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from peeps_captions import CAPTIONS, full_captions, random_captions, tokenize, write_tokenizer
from peeps_data import ATTRIBUTES, load
from peeps_training import train
from torch import Tensor, nn
from train_peeps_text import WIDTH, text_config
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

BATCH, RATE, READING = 64, 1e-3, 0.3
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": 64, "width": 64},
    "resample": 2,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=WIDTH,
    )
    text = text_config(tokenizer).to_dict()
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=WIDTH))


def augmented(images: Tensor) -> Tensor:
    """uint8 [B, 3, 64, 64] -> float in [-1, 1], half of them a little blurred and noisy, as generated images are."""
    images = images.float() / 127.5 - 1
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = images.lerp(blurred, (torch.rand(len(images), 1, 1, 1) - 0.5).clamp(min=0))
    return images + 0.1 * torch.rand(len(images), 1, 1, 1) * torch.randn(images.shape)


@torch.no_grad()
def retrieval(clip: CLIPModel, images: Tensor, tokens: Tensor) -> float:
    """Share of images [N, 3, 64, 64] whose own caption is the nearest of all N."""
    output = clip(input_ids=tokens, pixel_values=images.float() / 127.5 - 1)
    return float((output.logits_per_image.argmax(1) == torch.arange(len(images))).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of peeps_data.py; gets clip.pt")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--minutes", type=float, default=5, help="CPU time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(arguments.data / "tokenizer")
    pixels, labels = load(arguments.data, "training")
    images, targets = torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels)
    tokens = tokenize(tokenizer, random_captions(labels, CAPTIONS, seed=1)[0]).view(len(labels), CAPTIONS, -1)
    clip = build_clip(tokenizer)
    known = CLIPTextModel.from_pretrained(arguments.data / "text_encoder").state_dict()
    clip.text_model.load_state_dict({key.removeprefix("text_model."): value for key, value in known.items()})
    readers = nn.ModuleDict({name: nn.Linear(WIDTH, len(values)) for name, values in ATTRIBUTES.items()})
    networks = nn.ModuleDict({"clip": clip, "readers": readers})
    print(f"{sum(p.numel() for p in clip.parameters()):,} parameters", flush=True)

    def losses() -> dict[str, Tensor]:
        chosen = torch.randint(len(images), (BATCH,))
        prompts = tokens[chosen, torch.randint(CAPTIONS, (BATCH,))]
        output = clip(input_ids=prompts, pixel_values=augmented(images[chosen]), return_loss=True)
        reading = [
            F.cross_entropy(reader(output.image_embeds * WIDTH**0.5), targets[chosen, i])
            for i, reader in enumerate(readers.values())
        ]
        return {"contrast": output.loss, "reading": READING * torch.stack(reading).sum()}

    rates = {"clip": RATE, "readers": RATE}
    train(networks, losses, minutes=arguments.minutes, rates=rates, checkpoint=arguments.data / "clip.pt", average=0.99)
    test_pixels, test_labels = load(arguments.data, "held_out")
    test_images = torch.from_numpy(test_pixels[:512]).permute(0, 3, 1, 2)
    test_tokens = tokenize(tokenizer, full_captions(test_labels[:512], seed=0))
    right = retrieval(clip, test_images, test_tokens)
    print(f"of 512 held-out drawings {right:.1%} are nearest to their own caption")
    shutil.rmtree(arguments.out, ignore_errors=True)
    clip.half().save_pretrained(arguments.out)
    config = json.loads((arguments.out / "config.json").read_text())
    (arguments.out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    (arguments.out / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=1) + "\n")
    write_tokenizer(arguments.out)
    (arguments.out / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
