"""Compares ways to rank in eight bits on a CPU with the engine's float32 and bfloat16, on the full-size network.

    PYTHONPATH=. python benchmarks/bench_eight_bits.py
    pip install openvino nncf && PYTHONPATH=. python benchmarks/bench_eight_bits.py --openvino

Prints a table of single linear maps, one of whole networks (random weights, one image with many captions of equal
length), and one JSON line. All ways alternate in one run. Weights are quantised by output channel, inputs by tensor
when they come ("dynamic"). Without VNNI, the sum of two products of eight bits overflows sixteen, so that inputs have
seven bits there. The engine computes what captions share once; OpenVINO runs the exported network on each pair.
"""

import argparse
import json
import time
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.nn.functional import gelu

from configuration_ieft import IeftConfig
from ieft.cpu import prepacked
from ieft.cpu.prepacked import PrepackedLinear, multiplies_bfloat16
from ieft.evaluation.ranking import score_matrix
from modeling_ieft import IeftForImageTextRetrieval

TOKENS = 2048
SHAPES = ((768, 768), (768, 3072), (3072, 768))  # of the network's linear maps, inputs and outputs
CAPTION_LENGTH, PAIRS_AT_ONCE = 15, 8


class EightBitLinear(nn.Module):
    """In place of `PrepackedLinear`: torch's own linear map with weights and inputs of eight bits."""

    def __init__(self, linear, dtype=None, fuse_gelu=False):
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.abs().amax(1).double() / 127
        weight = torch.quantize_per_channel(weight, scales, torch.zeros_like(scales).long(), 0, torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach()
        self.packed, self.fuse_gelu = torch.ops.quantized.linear_prepack(weight, bias), fuse_gelu

    @torch.no_grad()
    def forward(self, inputs):
        outputs = torch.ops.quantized.linear_dynamic(inputs, self.packed, reduce_range=not has_vnni())
        return gelu(outputs) if self.fuse_gelu else outputs


def has_vnni():
    return torch.cpu._is_vnni_supported()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--openvino", action="store_true", help="also OpenVINO, in float32 and eight bits")
    args = parser.parse_args()
    torch.manual_seed(0)
    conditions = {
        "threads": torch.get_num_threads(), "vnni": has_vnni(), "bfloat16": multiplies_bfloat16(),
        "torch": torch.__version__, "captions": args.captions,
    }  # fmt: skip
    print(conditions)
    products = measure_products(args.repeats)
    networks = measure_networks(args)
    print(json.dumps({"benchmark": "eight_bits"} | conditions | {"gflops": products, "networks": networks}))


@torch.no_grad()
def measure_products(repeats):
    """GFLOP/s of single linear maps: name -> one for each of `SHAPES`."""
    rates = {}
    for inner, columns in SHAPES:
        linear, inputs = nn.Linear(inner, columns), torch.randn(TOKENS, inner)
        ways = {"float32": PrepackedLinear(linear, torch.float32), "eight bits": EightBitLinear(linear)}
        if multiplies_bfloat16():
            ways["bfloat16"] = PrepackedLinear(linear, torch.bfloat16)
        seconds = best_of(
            4 * repeats, {name: lambda way=way, inputs=inputs: way(inputs) for name, way in ways.items()}
        )
        for name, each in seconds.items():
            rates.setdefault(name, []).append(2 * TOKENS * inner * columns / each / 1e9)
    print(f"\n{'GFLOP/s of a linear map':<28}" + "".join(f"{f'{a} -> {b}':>14}" for a, b in SHAPES))
    for name, of_shapes in rates.items():
        print(f"{name:<28}" + "".join(f"{rate:>14.0f}" for rate in of_shapes))
    return rates


def best_of(repeats, ways):
    """Fewest seconds of each function, which take turns."""
    seconds = {}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name] = min(seconds.get(name, np.inf), time.perf_counter() - start)
    return seconds


def measure_networks(args):
    """Pairs a second, and how near the scores are to those of float32: name -> figures."""
    model = IeftForImageTextRetrieval(IeftConfig()).eval()
    side = model.config.image_size
    image = torch.rand(1, 3, side, side) * 2 - 1
    captions = torch.randint(1000, model.config.vocab_size, (args.captions, CAPTION_LENGTH))
    scores = {}

    def engine(name, dtype=None):
        scores[name] = score_matrix(networks[name], image, captions.tolist(), dtype=dtype, progress=False)[0]

    # A copy each, since what is prepared for ranking is kept by model; their weights are equal.
    networks = {
        name: IeftForImageTextRetrieval(model.config).eval() for name in ("engine, float32", "engine, eight bits")
    }
    for network in networks.values():
        network.load_state_dict(model.state_dict())
    with patch.object(prepacked, "PrepackedLinear", EightBitLinear):
        engine("engine, eight bits")
    ways = {name: lambda name=name: engine(name) for name in networks}
    if multiplies_bfloat16():
        networks["engine, bfloat16"] = model
        ways["engine, bfloat16"] = lambda: engine("engine, bfloat16", torch.bfloat16)
    if args.openvino:
        for name, network in openvino_networks(model, image, captions).items():
            ways[name] = lambda name=name, network=network: scores.update(
                {name: run_openvino(network, image, captions)}
            )
    seconds = best_of(args.repeats, ways)
    exact = scores["engine, float32"]
    print(f"\n{'network':<28}{'pairs/s':>10}{'times float32':>15}{'largest difference':>20}{'rank correlation':>18}")
    figures = {}
    for name, each in seconds.items():
        figures[name] = {
            "pairs_per_second": args.captions / each, "times": seconds["engine, float32"] / each,
            "difference": float(np.abs(scores[name] - exact).max()),
            "correlation": rank_correlation(scores[name], exact),
        }  # fmt: skip
        print(f"{name:<28}" + "{:>10.1f}{:>15.2f}{:>20.4f}{:>18.4f}".format(*figures[name].values()))
    return figures


def rank_correlation(scores, others):
    """Spearman's, of two lists without ties."""
    ranks = [np.argsort(np.argsort(each)) for each in (scores, others)]
    return float(np.corrcoef(*ranks)[0, 1])


class Pairs(nn.Module):
    """The network as it is exported: scores (B,) of pairs without padding."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, input_ids):
        return self.model(pixel_values=pixel_values, input_ids=input_ids).logits[:, 0]


def openvino_networks(model, image, captions):
    """OpenVINO's network in float32, and in eight bits, calibrated on some of the pairs by nncf."""
    import nncf
    import openvino

    pixels = image.expand(PAIRS_AT_ONCE, -1, -1, -1).contiguous()  # (B, 3, H, W)
    pairs = Pairs(model)
    converted = openvino.convert_model(pairs, example_input=(pixels, captions[:PAIRS_AT_ONCE]))
    calibration = nncf.Dataset(
        [(pixels.numpy(), some.numpy()) for some in captions[: 2 * PAIRS_AT_ONCE].split(PAIRS_AT_ONCE)]
    )
    quantised = nncf.quantize(converted, calibration, model_type=nncf.ModelType.TRANSFORMER, subset_size=2)
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    return {
        "OpenVINO, float32": openvino.compile_model(converted, "CPU", options),
        "OpenVINO, eight bits": openvino.compile_model(quantised, "CPU", options),
    }


def run_openvino(network, image, captions):
    pixels = image.expand(PAIRS_AT_ONCE, -1, -1, -1).numpy()
    found = [network((pixels[: len(some)], some.numpy()))[0] for some in captions.split(PAIRS_AT_ONCE)]
    return np.concatenate(found)


if __name__ == "__main__":
    main()
