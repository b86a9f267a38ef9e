# docker build -t mergeroute .                  a GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY . /source
RUN python -m venv /opt/mergeroute \
 && /opt/mergeroute/bin/pip install --no-cache-dir --disable-pip-version-check \
        --extra-index-url "$TORCH_INDEX" "/source[otel]"

FROM python:3.11-slim
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/mergeroute mergeroute \
 && install --directory --owner=mergeroute --group=mergeroute --mode=0700 /var/lib/mergeroute/state \
 && install --directory /modules /bank
COPY --from=build /opt/mergeroute /opt/mergeroute
COPY deploy/container.yaml /etc/mergeroute/serve.yaml
ENV PATH=/opt/mergeroute/bin:$PATH \
    HF_HOME=/var/lib/mergeroute/hub
USER mergeroute
WORKDIR /var/lib/mergeroute
VOLUME ["/var/lib/mergeroute", "/modules"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# a large backbone takes minutes to load
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=4 \
    CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["mergeroute"]
CMD ["serve", "--config", "/etc/mergeroute/serve.yaml"]
