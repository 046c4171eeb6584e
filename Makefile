# Every target is one line that can be typed without make.

.DEFAULT_GOAL := help
.PHONY: help test lint fmt doc loom rolling package bench demo fuzz vectors

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: ## everything: format, lints, features, docs, all tests, packages; ends with a count
	@scripts/check

lint: ## the quick part: the tree, format and clippy, warnings as errors
	@scripts/check tools tree format clippy

fmt: ## format the code
	cargo fmt --all

doc: ## build the documentation, warnings as errors, into target/doc
	@scripts/check doc

loom: ## the atomics in every interleaving
	@scripts/check loom

rolling: ## three processes restarted in turn under load, and not one request may fail
	@scripts/check rolling

package: ## pack what would be published, and build it from the packages
	@scripts/check package

bench: ## our layers beside their peers, as ratios
	cargo bench -p buttress-benches

demo: ## the reverse proxy with all layers on, an upstream of its own, and curl lines to try
	cargo run --release --example reverse-proxy

fuzz: ## a minute of made-up input for each thing that reads what strangers send
	@scripts/fuzz

vectors: ## have the vendors' libraries sign and judge requests again, for the webhook tests
	@scripts/webhook-vectors/make
