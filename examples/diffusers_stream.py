"""A video from a diffusers pipeline, chunk by chunk as it is made: ``python examples/diffusers_stream.py``.

Runs in seconds and without a download: the pipeline is tiny, with random weights, and its video is noise.
``main`` says what to change for a real one.
"""

import argparse

import diffusers
import tokenizers
import torch
import transformers

from rfkernels.integrations.diffusers import stream


def tiny_pipeline() -> diffusers.WanPipeline:
    """The parts of Wan 2.1, each as small as it can be."""
    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "walks", "sleeps"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    text = transformers.UMT5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=2, text_dim=16, freq_dim=16
    )
    vae = diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return diffusers.WanPipeline(
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=transformers.UMT5EncoderModel(text).eval(),
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=int, default=45, help="default %(default)s")
    parser.add_argument("--out", default="video.webp", help="an animated picture (.webp, .gif), default %(default)s")
    args = parser.parse_args()

    # A real one, whose transformer has the weights of a causal few-step model, not Wan's own:
    #   pipe = diffusers.WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16)
    #   rfkernels.models.load_checkpoint(pipe.transformer, "rewardforcing.pt")  # or Self Forcing's, LongLive's
    #   pipe.to("cuda")
    # or, with less memory, in place of the last line:
    #   pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    #   pipe.enable_model_cpu_offload()
    pipe = tiny_pipeline()

    # A real one: height=480, width=832, shift=5.0, and no max_sequence_length. As published, Reward Forcing has
    # alpha=0.999, Self Forcing and LongLive alpha=1.0 and sink_positions="absolute".
    video = stream(
        pipe, "a cat walks", height=32, width=48, num_frames=args.frames, max_sequence_length=8, alpha=0.999, seed=1,
        output_type="pil",
    )  # fmt: skip
    frames = []
    for (chunk,) in video:  # of one prompt; pictures, to be shown while the next ones are made
        frames += chunk
        print(f"{len(frames)} frames, {video.sampler.cache.nbytes / 1e6:.2f} MB of cache")
        if video.sampler.chunk == 2:
            video.switch("a dog sleeps")
    # diffusers.utils.export_to_video(frames, "video.mp4", fps=16) needs imageio and imageio-ffmpeg.
    frames[0].save(args.out, save_all=True, append_images=frames[1:], duration=1000 / 16)


if __name__ == "__main__":
    main()
