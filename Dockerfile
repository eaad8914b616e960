# The service on the host's processors: `docker build -t patrickstar .`. For a GPU, RUST_IMAGE wants nvcc beside Rust, BASE_IMAGE
# the CUDA libraries, FEATURES is "cuda", and the container is run with `--gpus all`.
ARG RUST_IMAGE=rust:1.95-bookworm
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${RUST_IMAGE} AS build
ARG FEATURES=
# What the image says it was built from: `--build-arg REVISION=$(git rev-parse HEAD)`, for the repository is not copied.
ARG REVISION=
WORKDIR /src
COPY . .
RUN PATRICKSTAR_REVISION="${REVISION}" cargo build --locked --release --bin patrickstar --features "${FEATURES}" && strip target/release/patrickstar

FROM ${BASE_IMAGE}
RUN useradd --system --uid 10001 --home-dir /var/lib/patrickstar --create-home patrickstar
COPY --from=build /src/target/release/patrickstar /usr/local/bin/patrickstar
# Something to train on, and how.
COPY config /usr/share/patrickstar/config
COPY README.md docs /usr/share/patrickstar/texts/
USER patrickstar
WORKDIR /var/lib/patrickstar
VOLUME /var/lib/patrickstar
# Ends in order, after a checkpoint.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --start-period=30s CMD ["patrickstar", "jobs", "list"]
ENTRYPOINT ["patrickstar"]
CMD ["serve", "--data", "/var/lib/patrickstar/service"]
