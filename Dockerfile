# Midway with its default feature network. TORCH_INDEX names another index of torch's wheels, of those for the CPU alone, say:
#   docker build -t midway .
#   docker build -t midway --build-arg TORCH_INDEX=URL .
#   docker run --rm -v "$PWD:/data" midway train tokenizer digits-fsq
FROM python:3.13-slim

ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# torch.compile and Triton compile C++ when they run
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

RUN pip install torch torchvision ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}

WORKDIR /opt/midway
COPY pyproject.toml README.md LICENSE ./
COPY gen gen
COPY samplers samplers
COPY tokenizers tokenizers
RUN pip install '.[data]'

# runs/ is written below the current directory
RUN useradd --create-home midway && mkdir /data && chown midway /data
USER midway
WORKDIR /data
ENTRYPOINT ["midway"]
CMD ["--help"]
