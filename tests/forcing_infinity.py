"""LongLive's infinity model in small: keys un-rotated in the cache, numbered by their place in it."""

from forcing_models import LongLiveAttention, LongLiveModel, rotate

block_relativistic_rope = rotate  # by this name the module is known


class InfinityAttention(LongLiveAttention):
    relative = True

    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
        sink_recache_after_switch=False,
    ):  # fmt: skip
        return super().forward(
            x, seq_lens, grid_sizes, freqs, block_mask, kv_cache, current_start, cache_start, sink_recache_after_switch
        )


class InfinityModel(LongLiveModel):
    attention = InfinityAttention
