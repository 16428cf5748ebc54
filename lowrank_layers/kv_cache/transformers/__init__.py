"""All that knows transformers: its cache interface, the layouts of its attentions, and what replaces them.

:class:`LowRankCache` needs the package itself, the extra ``transformers``; the other files only read its modules.
"""
