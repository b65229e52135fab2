"""Learn tasks one after another, and measure forgetting (TRACE, paper section 4.3)."""
