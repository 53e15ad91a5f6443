"""One file per statistic: something small about models that is worked out once and shared by many merges."""
