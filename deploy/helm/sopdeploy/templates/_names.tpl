{{- /* The name of all objects of a release */}}
{{- define "sopdeploy.name" -}}
{{ .Values.fullnameOverride | default .Release.Name }}
{{- end }}

{{- /* The labels of its pods, by which the other objects find them */}}
{{- define "sopdeploy.labels" -}}
app.kubernetes.io/name: sopdeploy
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
