"""Operating on a model: which modules it has, replacing them, opening its attentions, keeping the optimizer in step."""
