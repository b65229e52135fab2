"""Commands of `hft-trl`, grouped by what they work on; `hft_trl.cli` puts them together."""
