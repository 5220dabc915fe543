"""Model runners: what turns a step plan into tokens; `kvarena.engine.model_runner` says what is asked of one."""
