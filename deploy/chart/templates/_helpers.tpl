{{- define "sidestep.labels" -}}
app.kubernetes.io/part-of: sidestep
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ if .Values.createNamespace }}kubectl{{ else }}{{ .Release.Service }}{{ end }}
{{- end -}}

{{- define "sidestep.image" -}}
image: "{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end -}}

{{- define "sidestep.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "sidestep.cniCapabilities" -}}
capabilities:
  drop: [ALL]
  # Root without them may not write what is not root's, as directories of plugins often are.
  add:
    - DAC_OVERRIDE # directories and configurations of another user
    - CHOWN # a configuration stays its owner's when it is replaced
{{- end -}}

{{- define "sidestep.caName" -}}
sidestep-ca.{{ .Release.Namespace }}.svc
{{- end -}}

{{- define "sidestep.caAddress" -}}
{{- if .Values.agent.caAddress -}}
{{ .Values.agent.caAddress }}
{{- else if .Values.ca.clusterIP -}}
{{ if contains ":" .Values.ca.clusterIP }}[{{ .Values.ca.clusterIP }}]{{ else }}{{ .Values.ca.clusterIP }}{{ end }}:15012
{{- else -}}
{{ include "sidestep.caName" . }}:15012
{{- end -}}
{{- end -}}
