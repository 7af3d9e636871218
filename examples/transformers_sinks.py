"""Language models of transformers on rfkernels: learned sinks (gpt-oss), and a stream with the first tokens as sinks.

Runs as it is, on small models with random weights, and downloads nothing. For a real one put

    AutoModelForCausalLM.from_pretrained("mistralai/Mistral-7B-v0.1", attn_implementation=name)

in place of the models made here.
"""

import torch
from transformers import GptOssConfig, GptOssForCausalLM, MistralConfig, MistralForCausalLM

from rfkernels.integrations import transformers as rf_transformers

SIZES = dict(
    vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, sliding_window=16, initializer_range=0.2,
)  # fmt: skip


def same_as_eager(model: torch.nn.Module, name: str) -> float:
    """The largest difference between the logits of this attention and of transformers' own."""
    tokens = torch.randint(0, 128, (2, 64))
    model.set_attn_implementation("eager")
    eager = model(tokens).logits
    model.set_attn_implementation(name)
    return (model(tokens).logits - eager).abs().max().item()


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    name = rf_transformers.register()
    gpt_oss = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)).eval()
    mistral = MistralForCausalLM(MistralConfig(**SIZES)).eval()
    print(f"gpt-oss, sinks it learned:  {same_as_eager(gpt_oss, name):.1e} from eager")
    print(f"Mistral, a sliding window:  {same_as_eager(mistral, name):.1e} from eager")

    # The first four tokens stay visible for ever. The cache holds them and the window, however long the text gets.
    mistral.set_attn_implementation(rf_transformers.register("rfkernels_sinks", sink_tokens=4))
    cache = rf_transformers.SinkWindowCache(mistral.config, sink_tokens=4)
    prompt = torch.randint(0, 128, (1, 8))
    mask = torch.ones_like(prompt)
    text = mistral.generate(
        prompt,
        attention_mask=mask,
        max_new_tokens=200,
        min_new_tokens=200,
        do_sample=False,
        cache=cache,
        pad_token_id=0,
    )
    print(f"{text.shape[1]} tokens of text, {cache.layers[0].keys.shape[2]} in the cache: its size is constant")


if __name__ == "__main__":
    main()
