"""What the parts of a node are told: addresses, configuration files, and the objects that it starts with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools.node.system_images import COREDNS_IMAGE, PAUSE_IMAGE

if TYPE_CHECKING:
    from pathlib import Path

NODE_NAME = "asd-node"
NODE_ADDRESS = "10.77.0.1"
API_PORT = 6443
POD_RANGE = "10.244.0.0/24"
SERVICE_RANGE = "10.96.0.0/16"
API_SERVICE = "10.96.0.1"
DNS_SERVICE = "10.96.0.10"

# Volumes that claims find without saying how, in folders of the node: as many as the tests claim.
VOLUMES = tuple(f"/var/lib/volumes/{number}" for number in range(8))


def kubeconfig(certificates: Path, user: str, server: str) -> dict[str, object]:
    """Return the kubeconfig of a user whose certificate lies in a folder."""
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "asd",
                "cluster": {"server": server, "certificate-authority": str(certificates / "ca.crt")},
            }
        ],
        "users": [
            {
                "name": user,
                "user": {
                    "client-certificate": str(certificates / f"{user}.crt"),
                    "client-key": str(certificates / f"{user}.key"),
                },
            }
        ],
        "contexts": [{"name": "asd", "context": {"cluster": "asd", "user": user}}],
        "current-context": "asd",
    }


def containerd_config(folder: Path, plugins: Path) -> str:
    """Return containerd's configuration. plugins: the folder of the CNI plugins."""
    runtime = "plugins.'io.containerd.cri.v1.runtime'"
    return f"""version = 3
root = '/var/lib/containerd'
state = '/run/containerd'

[grpc]
address = '/run/containerd/containerd.sock'

[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = '{PAUSE_IMAGE}'

[{runtime}]
# A machine may give root no CAP_SYS_RESOURCE.
restrict_oom_score_adj = true

[{runtime}.cni]
bin_dirs = ['{plugins}']
conf_dir = '{folder}/cni'

[{runtime}.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'
"""


def kubelet_config(folder: Path) -> dict[str, object]:
    """Return the kubelet's configuration."""
    certificates = folder / "certificates"
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "x509": {"clientCAFile": str(certificates / "ca.crt")},
        },
        "tlsCertFile": str(certificates / "kubelet-server.crt"),
        "tlsPrivateKeyFile": str(certificates / "kubelet-server.key"),
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "failSwapOn": False,
        # The disk's file system is not seen from here.
        "localStorageCapacityIsolation": False,
        "evictionHard": {"memory.available": "100Mi"},
        "imageGCHighThresholdPercent": 100,
        "clusterDNS": [DNS_SERVICE],
        "clusterDomain": "cluster.local",
        "resolvConf": str(folder / "resolv.conf"),
        "nodeStatusUpdateFrequency": "5s",
    }


def proxy_config(folder: Path) -> dict[str, object]:
    """Return kube-proxy's configuration."""
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": str(folder / "proxy.kubeconfig")},
        "hostnameOverride": NODE_NAME,
        "clusterCIDR": POD_RANGE,
        # Not to be set outside the machine's first network namespace.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }


def storage_objects() -> dict[str, object]:
    """Return the default storage class, and a volume of it for each folder."""
    storage_class = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {
            "name": "local",
            "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
        },
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "WaitForFirstConsumer",
    }
    term = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE_NAME]}]}
    volumes = [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": f"local-{number}"},
            "spec": {
                "storageClassName": "local",
                "capacity": {"storage": "100Gi"},
                "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
                "local": {"path": path},
                "nodeAffinity": {"required": {"nodeSelectorTerms": [term]}},
            },
        }
        for number, path in enumerate(VOLUMES)
    ]
    return {"apiVersion": "v1", "kind": "List", "items": [storage_class, *volumes]}


DNS_OBJECTS = f"""
apiVersion: v1
kind: ServiceAccount
metadata: {{name: coredns, namespace: kube-system}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {{name: system:coredns}}
rules:
  - apiGroups: [""]
    resources: [endpoints, services, pods, namespaces]
    verbs: [list, watch]
  - apiGroups: [discovery.k8s.io]
    resources: [endpointslices]
    verbs: [list, watch]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: system:coredns}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: system:coredns}}
subjects: [{{kind: ServiceAccount, name: coredns, namespace: kube-system}}]
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: coredns, namespace: kube-system}}
data:
  Corefile: |
    .:53 {{
        errors
        health :8080
        ready :8181
        kubernetes cluster.local {{
            ttl 1
        }}
        cache 1
    }}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: coredns, namespace: kube-system}}
spec:
  selector: {{matchLabels: {{k8s-app: coredns}}}}
  template:
    metadata: {{labels: {{k8s-app: coredns}}}}
    spec:
      serviceAccountName: coredns
      priorityClassName: system-cluster-critical
      dnsPolicy: Default
      containers:
        - name: coredns
          image: {COREDNS_IMAGE}
          imagePullPolicy: Never
          args: [-conf, /etc/coredns/Corefile]
          readinessProbe:
            httpGet: {{path: /ready, port: 8181}}
            periodSeconds: 1
          resources: {{requests: {{cpu: 10m, memory: 32Mi}}}}
          volumeMounts: [{{name: config, mountPath: /etc/coredns}}]
      volumes: [{{name: config, configMap: {{name: coredns}}}}]
---
apiVersion: v1
kind: Service
metadata: {{name: kube-dns, namespace: kube-system}}
spec:
  clusterIP: {DNS_SERVICE}
  selector: {{k8s-app: coredns}}
  ports:
    - {{name: dns, port: 53, protocol: UDP}}
    - {{name: dns-tcp, port: 53, protocol: TCP}}
"""
