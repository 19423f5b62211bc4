"""What an answer costs: FLOPs and bytes, counted by formula."""

from tokensel.cost.count import Cost, count_decoder, count_projector, count_trunk, count_vision, first_token, kv_bytes

__all__ = ["Cost", "count_decoder", "count_projector", "count_trunk", "count_vision", "first_token", "kv_bytes"]
