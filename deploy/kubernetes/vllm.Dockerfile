# docker build -t mergeroute-vllm -f deploy/kubernetes/vllm.Dockerfile .        in the checkout: the plugin is its own
FROM vllm/vllm-openai:v0.32.0
COPY . /source
RUN pip install --no-cache-dir --disable-pip-version-check /source && rm -r /source
