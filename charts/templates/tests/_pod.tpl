{{/* Pod of `helm test`: dict "root" $ "test" its name "command" and "args" lists. */}}
{{- define "asd.testPod" -}}
{{- $root := .root }}
{{- $name := include "asd.fullname" $root }}
{{- $tls := $root.Values.tls }}
{{- $auth := $root.Values.auth }}
apiVersion: v1
kind: Pod
metadata:
  name: {{ $name }}-test-{{ .test }}
  labels:
    {{- include "asd.labels" (dict "root" $root "component" "test") | nindent 4 }}
  annotations:
    helm.sh/hook: test
    helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
spec:
  restartPolicy: Never
  # A pod that waits for its image for ever ends before `helm test` gives up, which it does after five minutes.
  activeDeadlineSeconds: 240
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  securityContext:
    {{- include "asd.podSecurity" $root | nindent 4 }}
  containers:
    - name: {{ .test }}
      image: {{ include "asd.image" (dict "root" $root "image" "tools") }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: {{ toJson .command }}
      args:
        {{- toYaml .args | nindent 8 }}
      {{- if $tls.enabled }}
      env:
        - {name: ASD_TLS_CA, value: /tls/ca.crt}
        {{- if $tls.clientCertificates }}
        - {name: ASD_TLS_CERT, value: /tls/tls.crt}
        - {name: ASD_TLS_KEY, value: /tls/tls.key}
        {{- end }}
      {{- end }}
      securityContext:
        {{- include "asd.containerSecurity" . | nindent 8 }}
      resources:
        requests: {cpu: 50m, memory: 96Mi}
        limits: {memory: 256Mi}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        {{- if $tls.enabled }}
        - {name: tls, mountPath: /tls, readOnly: true}
        {{- end }}
        {{- if $auth.enabled }}
        - {name: auth, mountPath: /auth, readOnly: true}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: 64Mi}
    {{- if $tls.enabled }}
    - name: tls
      secret:
        secretName: {{ include "asd.tlsSecret" (dict "root" $root "component" "client") }}
        {{- if not $tls.clientCertificates }}
        items: [{key: ca.crt, path: ca.crt}]
        {{- end }}
    {{- end }}
    {{- if $auth.enabled }}
    - name: auth
      secret:
        secretName: {{ $auth.secretName }}
        items: [{key: {{ $auth.key | quote }}, path: tokens}]
    {{- end }}
{{- end -}}

{{- define "asd.testQuestion" -}}
Max has 9 beads. Max finds 10 more. How many beads does Max have now?
{{- end -}}

{{/* Lines of Python that set `token` to the first one of the Secret. */}}
{{- define "asd.testToken" -}}
{{- $said := printf "the Secret %s holds no token under its key %s: put one on a line" .Values.auth.secretName .Values.auth.key -}}
lines = [line.strip() for line in open("/auth/tokens")]
tokens = [line.rpartition(":")[2].strip() for line in lines if line and not line.startswith("#")]
token = next(filter(None, tokens), "")
if not token:
    sys.exit({{ toJson $said }})
{{- end -}}
