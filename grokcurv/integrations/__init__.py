"""grokcurv inside other training frameworks; each module imports its framework, so import what you use."""
